"""Whose turn it is: urgency, age, fair shares and arrival."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
from headrace.core.queue import AGEING_SECONDS, AGEING_SHARE, WaitingQueue
from headrace.core.request import Request
from headrace.ipc.messages import Sampling
from hypothesis import given, settings
from hypothesis import strategies as st


def request(client: str = "a", priority: int = 0, arrival: float = 0.0, length: int = 1) -> Request:
    return Request(client.encode(), 0, array("i", range(length)), Sampling(), 4, priority, arrival)


def fill(queue: WaitingQueue, *requests: Request) -> list[Request]:
    for each in requests:
        queue.enter(each)
    return list(requests)


def drain(queue: WaitingQueue, now: float = 0.0, cost: int = 0) -> list[Request]:
    """Admit everyone; each costs its client `cost` tokens and never ends."""
    order: list[Request] = []
    while (head := queue.next(now)) is not None:
        queue.take(head, now)
        head.share.num_tokens += cost
        order.append(head)
    return order


def test_one_client_is_served_in_order() -> None:
    queue = WaitingQueue(by_priority=False)
    requests = fill(queue, *(request(priority=-i) for i in range(20)))
    assert drain(queue, cost=5) == requests


def test_a_crowd_delays_a_newcomer_by_one_turn() -> None:
    queue = WaitingQueue(by_priority=False)
    fill(queue, *(request("crowd") for _ in range(1000)))
    for _ in range(10):
        head = queue.next(0.0)
        assert head is not None
        queue.take(head, 0.0)
        head.share.num_tokens += 100
    (single,) = fill(queue, request("single"))
    turns = [queue.next(0.0)]
    if turns[-1] is not single:
        assert turns[-1] is not None
        queue.take(turns[-1], 0.0)
        turns[-1].share.num_tokens += 100
        turns.append(queue.next(0.0))
    assert turns[-1] is single


def test_clients_get_equal_tokens_not_equal_requests() -> None:
    queue = WaitingQueue(by_priority=False)
    fill(queue, *(request("large") for _ in range(100)), *(request("small") for _ in range(100)))
    spent: Counter[bytes] = Counter()
    for _ in range(55):
        head = queue.next(0.0)
        assert head is not None
        queue.take(head, 0.0)
        cost = 100 if head.client == b"large" else 10
        head.share.num_tokens += cost
        spent[head.client] += cost
    assert abs(spent[b"large"] - spent[b"small"]) <= 100


def test_who_comes_back_has_no_claim_on_the_past() -> None:
    queue = WaitingQueue(by_priority=False)
    (first,) = fill(queue, request("busy"))
    first.share.num_tokens += 1000
    (late,) = fill(queue, request("late"))
    assert late.share.num_tokens == 1000
    queue.remove(late)
    queue.leave(late)
    assert fill(queue, request("late"))[0].share.num_tokens == 1000


def test_urgency_goes_before_shares() -> None:
    queue = WaitingQueue(by_priority=True)
    low, high, middle = fill(queue, request("a", 5), request("b", -2), request("a", 1))
    high.share.num_tokens += 10**6
    assert drain(queue) == [high, middle, low]


def test_the_oldest_gets_its_share_once_it_is_old() -> None:
    queue = WaitingQueue(by_priority=True)
    (old,) = fill(queue, request(priority=9))
    fill(queue, *(request(priority=0, arrival=AGEING_SECONDS) for _ in range(3 * AGEING_SHARE)))
    assert old not in drain(queue, AGEING_SECONDS - 1)[: 3 * AGEING_SHARE]

    (old,) = fill(queue, request(priority=9))
    fill(queue, *(request(priority=0, arrival=AGEING_SECONDS) for _ in range(3 * AGEING_SHARE)))
    assert old in drain(queue, AGEING_SECONDS)[:AGEING_SHARE]
    assert old.order < (-(2**31), 0)  # before every priority: it is not displaced again


@pytest.mark.parametrize("by_priority", [False, True])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abc"), st.integers(-1, 1)), max_size=80),
)
def test_against_a_plain_list(by_priority: bool, steps: list[tuple[int, str, int]]) -> None:
    """Whatever comes and goes, the choice is the one that a look at everyone would make."""
    queue = WaitingQueue(by_priority)
    waiting: list[Request] = []
    running: list[Request] = []
    now = 0.0
    for kind, client, priority in steps:
        now += 1.0
        if kind <= 1:
            waiting += fill(queue, request(client, priority, now, length=1 + len(waiting)))
        elif kind == 2 and running:
            queue.push(running[0])
            waiting.append(running.pop(0))
        elif waiting:
            gone = waiting.pop(len(steps) % len(waiting))
            queue.remove(gone)
            queue.leave(gone)
        level = min((r.priority for r in waiting if by_priority), default=0)
        urgent = [r for r in waiting if not by_priority or r.priority == level]
        firsts = [min((r for r in urgent if r.client == c), key=_arrival) for c in {r.client for r in urgent}]
        best = min(firsts, key=lambda r: (r.share.num_tokens, _arrival(r)), default=None)
        assert queue.most_urgent() is best
        assert list(queue) == sorted(waiting, key=_arrival)
        assert queue.num_prompt_tokens == sum(r.num_prompt_tokens for r in waiting)
        if best is not None and kind == 0:
            assert queue.first_in_line(best, 2)[0] is best
            queue.take(best, now)
            best.share.num_tokens += 7
            waiting.remove(best)
            running.append(best)


def _arrival(request: Request) -> int:
    return request.order[1]
