"""Which deadline holds when, and that ended requests do not pile up behind far ones."""

from __future__ import annotations

from array import array
from typing import ClassVar

import pytest
from headrace.core.deadlines import DeadlineQueue
from headrace.core.request import Deadlines, Phase, Request
from headrace.ipc.messages import Sampling


def request(*deadlines: float | None) -> Request:
    return Request(b"", 0, array("i", [1]), Sampling(), 4, deadlines=Deadlines(*deadlines))


@pytest.mark.parametrize(
    ("deadlines", "started", "has_token", "missed"),
    [
        ((5.0, None, None), False, False, True),
        ((5.0, None, None), True, False, False),
        ((None, 5.0, None), True, False, True),
        ((None, 5.0, None), True, True, False),
        ((None, None, 5.0), True, True, True),
        ((None, None, 5.1), True, True, False),
    ],
)
def test_what_each_deadline_asks(
    deadlines: tuple[float | None, ...], started: bool, has_token: bool, missed: bool
) -> None:
    queue, one = DeadlineQueue(), request(*deadlines)
    queue.add(one)
    if started:
        one.move(Phase.RUNNING)
    if has_token:
        one.tokens.append(1)
    assert queue.pop_missed(4.9) == []
    assert queue.pop_missed(5.0) == ([one] if missed else [])


def test_soonest_first_and_each_once() -> None:
    queue = DeadlineQueue()
    assert queue.soonest is None
    late, early = request(3.0, 3.0, 9.0), request(2.0)
    queue.add(late)
    queue.add(early)
    assert queue.soonest == 2.0
    assert queue.pop_missed(3.0) == [early, late]


class Compared(Request):
    """Counts how often it is compared with another."""

    count: ClassVar[int] = 0

    def __eq__(self, other: object) -> bool:
        Compared.count += 1
        return self is other

    __hash__ = object.__hash__


def test_hundreds_that_miss_theirs_at_once_are_not_compared_with_each_other() -> None:
    queue = DeadlineQueue()
    for number in range(300):
        missing = Deadlines(None, 1.0, 1.0)
        queue.add(Compared(b"", number, array("i", [1]), Sampling(), 4, deadlines=missing))
    assert [each.number for each in queue.pop_missed(1.0)] == list(range(300))
    assert Compared.count < 3000


def test_ended_requests_are_let_go() -> None:
    queue = DeadlineQueue()
    for _ in range(1000):
        one = request(None, None, 1e9)
        queue.add(one)
        one.move(Phase.FINISHED)
        queue.forget(one)
    assert len(queue) < 200
