"""One client at a time tries what cores may have died of."""

from __future__ import annotations

from headrace.core.turns import MAX_SECONDS, Turns


def test_one_after_another() -> None:
    turns = Turns()
    assert turns.ask(b"a", 1, 0.0) == (b"a", 1)
    assert turns.ask(b"b", 7, 0.0) is None
    assert turns.ask(b"c", 9, 0.0) is None
    assert turns.leave(b"b", 0.0) is None  # changed its mind, or died
    assert turns.leave(b"a", 0.0) == (b"c", 9)
    assert turns.leave(b"c", 0.0) is None
    assert turns.ask(b"a", 2, 0.0) == (b"a", 2)


def test_who_asks_again_goes_to_the_end() -> None:
    turns = Turns()
    turns.ask(b"a", 1, 0.0)
    turns.ask(b"b", 2, 0.0)
    assert turns.ask(b"a", 3, 0.0) == (b"b", 2)
    assert turns.leave(b"b", 0.0) == (b"a", 3)
    assert turns.ask(b"a", 4, 0.0) == (b"a", 4)  # alone


def test_nobody_keeps_it_for_ever_while_others_wait() -> None:
    turns = Turns()
    turns.ask(b"a", 1, 0.0)
    assert turns.expire(2 * MAX_SECONDS) is None
    turns.ask(b"b", 2, 2 * MAX_SECONDS)
    assert turns.expire(2 * MAX_SECONDS) == (b"b", 2)
    assert turns.expire(2 * MAX_SECONDS) is None
    turns.ask(b"c", 3, 2 * MAX_SECONDS)
    assert turns.expire(3 * MAX_SECONDS - 1) is None
    assert turns.expire(3 * MAX_SECONDS) == (b"c", 3)
