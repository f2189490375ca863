"""What a new core is told, and who is found to be the death of cores."""

from __future__ import annotations

import time
from typing import Any

import pytest
from headrace import RequestCrashedError, RequestOutputKind
from headrace.frontend.metrics import FrontendMetrics
from headrace.frontend.request_table import RequestTable
from headrace.frontend.requests import Request
from headrace.ipc.messages import AddRequest, Sampling, Started, StepOutputs, pack, unpack


@pytest.fixture
def table() -> RequestTable:
    return RequestTable()


def add(table: RequestTable, name: str, n: int = 1, *, is_sent: bool = True, **changes: Any) -> Request:
    request = Request(name, None, [1, 2], RequestOutputKind.DELTA, False, FrontendMetrics())
    table.reserve(request)
    request.begin([None] * n, [None] * n, 0, 50)
    message = AddRequest(table.number(request), pack([1, 2]), Sampling(seed=2**63 - 1), 50, n, **changes)
    table.hand_over(request, message, is_sent=is_sent)
    return request


def bring(table: RequestTable, **tokens: int) -> None:
    numbers = [int(name[1:]) for name in tokens]
    assert table.apply(StepOutputs(pack(numbers), pack(tokens.values()))) == []


def numbers(messages: list[AddRequest]) -> list[int]:
    return [message.request for message in messages]


def test_each_completion_goes_on_with_its_own_tokens_and_seed(table: RequestTable) -> None:
    add(table, "a", n=2)
    bring(table, _0=7, _1=8)
    bring(table, _1=9)
    table.lose_core(1, beyond_doubt=True)
    assert table.owes_replays
    first, second = table.replays(may_try=True)
    assert (first.request, first.n, list(unpack(first.generated))) == (0, 1, [7])
    assert (second.request, second.n, list(unpack(second.generated))) == (1, 1, [8, 9])
    assert (first.sampling.seed, second.sampling.seed) == (2**63 - 1, 0)
    assert not table.owes_replays


def test_time_goes_on_while_there_is_no_core(table: RequestTable, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, Any] = {"queue_timeout": 5.0, "first_token_timeout": 10.0, "total_timeout": 20.0}
    for name in "abc":
        add(table, name, **limits)
    table.apply(StepOutputs(b"", b"", [Started(1, 0, 0.5)]))
    table.apply(StepOutputs(pack([2]), pack([7]), [Started(2, 0, 0.5)]))
    table.lose_core(1, beyond_doubt=True)
    later = time.monotonic() + 8
    monkeypatch.setattr(time, "monotonic", lambda: later)
    waiting, started, speaking = table.replays(may_try=True)
    assert (waiting.queue_timeout, started.queue_timeout, speaking.queue_timeout) == (0.001, None, None)
    assert waiting.first_token_timeout == pytest.approx(2, abs=0.5)
    assert started.first_token_timeout == pytest.approx(2, abs=0.5)
    assert speaking.first_token_timeout is None
    assert speaking.total_timeout == pytest.approx(12, abs=0.5)


def test_what_ended_or_came_meanwhile(table: RequestTable) -> None:
    gone = add(table, "gone")
    add(table, "stays")
    table.lose_core(1, beyond_doubt=True)
    add(table, "new", is_sent=False)
    table.drop(gone)
    gone.abort()
    assert numbers(table.replays(may_try=True)) == [1, 2]


def test_the_death_of_cores_is_found_and_ends(table: RequestTable) -> None:
    """Request 2 is: nobody else ends, and those that bring tokens are never held back."""
    requests = [add(table, str(number)) for number in range(5)]
    table.lose_core(1, beyond_doubt=True)
    assert numbers(table.replays(may_try=True)) == [0, 1, 2, 3, 4]
    bring(table, _0=7)
    table.lose_core(1, beyond_doubt=True)  # the second without a word from 1 to 4: one after the other
    assert numbers(table.replays(may_try=True)) == [0, 1]
    assert table.replays(may_try=True) == []
    bring(table, _0=7, _1=7)
    assert numbers(table.replays(may_try=True)) == [2]
    table.lose_core(1, beyond_doubt=True)
    with pytest.raises(RequestCrashedError):
        requests[2].take()
    assert numbers(table.replays(may_try=True)) == [0, 1, 3, 4]
    assert not any(request.ended for request in requests if request is not requests[2])


def test_suspects_wait_for_their_turn(table: RequestTable) -> None:
    for name in ("a", "b"):
        add(table, name)
    for _ in range(2):
        table.lose_core(1, beyond_doubt=True)
        sent = table.replays(may_try=False)
    assert numbers(sent) == []
    assert table.has_suspects
    table.lose_core(1, beyond_doubt=True)  # nothing of ours was there
    assert numbers(table.replays(may_try=True)) == [0]
    bring(table, _0=7)
    assert numbers(table.replays(may_try=True)) == [1]
    assert table.has_suspects
    bring(table, _1=7)
    assert not table.has_suspects


def test_nobody_is_blamed_in_doubt(table: RequestTable) -> None:
    request = add(table, "a")
    for beyond_doubt in (False, False, True):
        assert not request.ended
        table.lose_core(1, beyond_doubt=beyond_doubt)
        table.replays(may_try=True)
    with pytest.raises(RequestCrashedError):
        request.take()


def test_nobody_is_blamed_for_a_connection(table: RequestTable) -> None:
    requests = [add(table, name) for name in "ab"]
    for _ in range(3):
        table.lose_connection()
        assert numbers(table.replays(may_try=True)) == [0, 1]
    for _ in range(2):
        table.lose_core(1, beyond_doubt=True)
        sent = table.replays(may_try=True)
    assert numbers(sent) == [0]  # suspects go one by one
    table.lose_connection()
    assert numbers(table.replays(may_try=True)) == [0]  # as before
    bring(table, _0=7)
    table.lose_connection()  # the first has got further
    assert numbers(table.replays(may_try=True)) == [0, 1]
    table.lose_core(1, beyond_doubt=True)
    assert not any(request.ended for request in requests[:1])
    with pytest.raises(RequestCrashedError):
        requests[1].take()


def test_no_replays_when_none_are_allowed(table: RequestTable) -> None:
    request = add(table, "a")
    waiting = add(table, "b", is_sent=False)
    table.lose_core(0, beyond_doubt=True)
    with pytest.raises(RequestCrashedError):
        request.take()
    assert not waiting.ended
