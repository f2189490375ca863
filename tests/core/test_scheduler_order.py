"""Whose turn it is, who makes room, what is refused for now and what ends early."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from headrace.core.limits import Limits
from headrace.core.request import Deadlines, Phase, Request
from headrace.core.scheduler import Pause, Scheduler
from headrace.core.steps import Ended
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import OverloadedError, RequestError
from headrace.ipc.messages import FinishReason, Sampling, StepPlan, unpack

from .plans import MakeScheduler, add, answer, counts, schedule

# --- order ------------------------------------------------------------------------------------------------


def run_until_started(scheduler: Scheduler, request: Request, now: float = 0.0, limit: int = 200) -> int:
    """Answer every plan with token 7; returns how many were sent up to the one that admits `request`."""
    for sent in range(1, limit):
        plan = scheduler.schedule(now)
        assert plan is not None
        if request.phase is not Phase.WAITING:
            return sent
        answer(scheduler, plan, *[7] * len(scheduler._in_flight[0].sampling))
    raise AssertionError("it never started")


def test_an_urgent_arrival_takes_the_slot_of_the_least_urgent(make: MakeScheduler) -> None:
    scheduler = make(max_num_seqs=2, scheduling_policy="priority")
    first, second = add(scheduler, 5, priority=1), add(scheduler, 5, priority=2, first=50)
    answer(scheduler, schedule(scheduler), 7, 7)
    slot = second.slot
    urgent = add(scheduler, 6, priority=0, first=100)
    plan = schedule(scheduler)
    assert second.phase is Phase.PREEMPTED
    assert (first.phase, urgent.phase, urgent.slot) == (Phase.RUNNING, Phase.RUNNING, slot)
    assert list(unpack(plan.released)) == [slot]
    assert counts(plan) == [1, 6]
    same = add(scheduler, 6, priority=1, first=150)  # not more urgent than any: it waits
    schedule(scheduler)
    assert same.phase is Phase.WAITING
    assert scheduler.stats().num_preemptions == 1


def test_an_urgent_arrival_takes_blocks_of_as_few_as_it_needs(make: MakeScheduler) -> None:
    scheduler = make(
        num_blocks=12, max_model_len=48, scheduling_policy="priority", enable_prefix_caching=False
    )
    crowd = [add(scheduler, 9, priority=p, first=20 * p) for p in (1, 2, 3)]  # three blocks each
    answer(scheduler, schedule(scheduler), 7, 7, 7)
    urgent = add(scheduler, 15, max_tokens=2, priority=0, first=100)
    schedule(scheduler)
    phases = [request.phase for request in crowd]
    assert phases == [Phase.RUNNING, Phase.RUNNING, Phase.PREEMPTED]
    assert urgent.phase is Phase.RUNNING


def test_nobody_is_displaced_in_vain(make: MakeScheduler) -> None:
    scheduler = make(
        num_blocks=12, max_model_len=48, scheduling_policy="priority", enable_prefix_caching=False
    )
    held = add(scheduler, 20, max_tokens=20, priority=0)
    lesser = add(scheduler, 9, priority=3, first=50)
    answer(scheduler, schedule(scheduler), 7, 7)
    add(scheduler, 36, max_tokens=2, priority=1, first=100)  # nine blocks; `held` leaves seven
    for _ in range(2):
        plan = schedule(scheduler)
        answer(scheduler, plan, 7, 7)
    assert (held.phase, lesser.phase) == (Phase.RUNNING, Phase.RUNNING)


def test_an_urgent_prompt_does_not_wait_for_a_long_one_under_way(make: MakeScheduler) -> None:
    scheduler = make(max_num_batched_tokens=8, scheduling_policy="priority")
    add(scheduler, 40, priority=1)
    answer(scheduler, schedule(scheduler))
    add(scheduler, 6, priority=0, first=100)
    assert counts(schedule(scheduler)) == [6, 2]


def test_nobody_is_displaced_for_a_request_that_is_held(make: MakeScheduler) -> None:
    scheduler = make(max_num_seqs=1, scheduling_policy="priority")
    add(scheduler, 5, priority=1)
    answer(scheduler, schedule(scheduler), 7)
    add(scheduler, 5, priority=0, first=50)
    scheduler.paused = Pause.NEW
    schedule(scheduler)
    assert scheduler.stats().num_preemptions == 0


def test_a_client_is_charged_for_every_token(make: MakeScheduler) -> None:
    scheduler = make()
    request = add(scheduler, 5, 3)
    while request.phase is not Phase.FINISHED:
        answer(scheduler, schedule(scheduler), 7)
    assert request.share.num_tokens == 5 + 2  # the last token is not computed


def test_an_equal_prompt_waits_for_the_one_under_way(make: MakeScheduler) -> None:
    scheduler = make(max_num_batched_tokens=8, scheduling_policy="priority")
    add(scheduler, 40, priority=1)
    answer(scheduler, schedule(scheduler))
    add(scheduler, 6, priority=1, first=100)
    assert counts(schedule(scheduler)) == [8]


def test_a_step_that_preempts_admits_nobody(make: MakeScheduler) -> None:
    """Not even where a block has become free, and it is another client's turn."""
    scheduler = make(num_blocks=6, max_model_len=24, enable_prefix_caching=False)
    for number in range(2):
        add(scheduler, 8, 16, client=b"a", first=20 * number)
    plans = [schedule(scheduler)]
    other = add(scheduler, 4, 4, client=b"b", first=60)
    while not scheduler.stats().num_preemptions:
        assert other.phase is Phase.WAITING
        plans.append(schedule(scheduler))
        answer(scheduler, plans.pop(0), 7, 7)
    assert plans[0].admitted == []
    schedule(scheduler)
    assert other.phase is Phase.RUNNING


def test_urgency_displaces_nobody_under_fcfs(make: MakeScheduler) -> None:
    scheduler = make(max_num_seqs=1)
    running = add(scheduler, 5, priority=2)
    schedule(scheduler)
    add(scheduler, 5, priority=0, first=50)
    schedule(scheduler)
    assert running.phase is Phase.RUNNING


def test_a_crowd_of_one_client_delays_another_by_one_request(make: MakeScheduler) -> None:
    scheduler = make(max_num_seqs=2, num_blocks=100)
    for i in range(1000):
        add(scheduler, 8, 4, first=i, client=b"crowd")
    answer(scheduler, schedule(scheduler), 7, 7)
    single = add(scheduler, 8, 4, first=500, client=b"single")
    assert run_until_started(scheduler, single) <= 6  # the four steps of those that run


def test_the_old_is_admitted_and_then_left_alone(make: MakeScheduler) -> None:
    scheduler = make(max_num_seqs=1, num_blocks=100, scheduling_policy="priority")
    old = add(scheduler, 8, 4, priority=5)
    now = 11.0
    for i in range(20):
        add(scheduler, 8, 2, first=i, priority=0, arrival=now)
    run_until_started(scheduler, old, now, limit=2 * 8 + 4)
    add(scheduler, 8, 2, priority=-5, arrival=now)
    scheduler.schedule(now)
    assert old.phase in (Phase.RUNNING, Phase.DRAINING)


def test_under_pressure_a_cached_prefix_goes_first_but_not_for_ever(make: MakeScheduler) -> None:
    scheduler = make(num_blocks=16, max_num_seqs=1, max_model_len=64)
    warm = add(scheduler, 40, 1)
    answer(scheduler, schedule(scheduler), 7)
    assert warm.phase is Phase.FINISHED
    head = add(scheduler, 40, 1, first=500)  # ten blocks; six hold nothing
    rivals = [add(scheduler, 41, 1) for _ in range(12)]
    started: list[Request] = []
    while len(started) < 13:
        started += answer(scheduler, schedule(scheduler), 7).started
    assert started == [*rivals[:8], head, *rivals[8:]]


@pytest.mark.parametrize(
    ("num_blocks", "length", "chunked"), [(64, 40, True), (16, 24, True), (16, 28, False)]
)
def test_without_pressure_the_order_is_that_of_arrival(
    make: MakeScheduler, num_blocks: int, length: int, chunked: bool
) -> None:
    """The blocks that hold nothing suffice; or no prompt may be cut: the rival may not fit into the step."""
    scheduler = make(num_blocks=num_blocks, max_num_seqs=1, max_model_len=64, enable_chunked_prefill=chunked)
    add(scheduler, 40, 1)
    answer(scheduler, schedule(scheduler), 7)
    head = add(scheduler, length, 1, first=500)
    add(scheduler, 41, 1)
    assert answer(scheduler, schedule(scheduler), 7).started == [head]


@pytest.mark.parametrize("pause", [Pause.NOTHING, Pause.NEW])
def test_while_new_requests_are_held_none_passes_for_its_prefix(make: MakeScheduler, pause: Pause) -> None:
    scheduler = make(num_blocks=16, max_num_seqs=1, scheduling_policy="priority")
    head = add(scheduler, 40, priority=1, first=500)
    plans = [schedule(scheduler)]
    add(scheduler, 40, 1, priority=0)
    plans.append(schedule(scheduler))
    for plan in plans:
        answer(scheduler, plan, 7)
    assert head.phase is Phase.PREEMPTED
    rival = add(scheduler, 41, priority=1)
    scheduler.paused = pause
    schedule(scheduler)
    first = rival if pause is Pause.NOTHING else head
    assert [request for request in (head, rival) if request.phase is Phase.RUNNING] == [first]


# --- cache ------------------------------------------------------------------------------------------------


def test_salts_do_not_share_blocks(make: MakeScheduler) -> None:
    scheduler = make()
    found = []
    for salt in ("", "a", "b", "a", ""):
        request = add(scheduler, 12, 1, cache_salt=salt)
        answer(scheduler, schedule(scheduler), 7)
        found.append(request.num_cached_tokens)
    assert found == [0, 0, 0, 8, 8]


def test_a_request_may_ignore_the_cache_and_still_fill_it(make: MakeScheduler) -> None:
    scheduler = make()
    found = []
    for skips in (True, True, False):
        request = add(scheduler, 12, 1, skip=skips)
        answer(scheduler, schedule(scheduler), 7)
        found.append(request.num_cached_tokens)
    assert found == [0, 0, 8]


def test_resetting_running_requests_recomputes_them(make: MakeScheduler) -> None:
    scheduler = make()
    request = add(scheduler, 9)
    answer(scheduler, schedule(scheduler), 7)
    assert not scheduler.reset_prefix_cache()
    assert scheduler.reset_prefix_cache(reset_running=True)
    assert scheduler.stats().num_free_blocks == 16
    (admit,) = schedule(scheduler).admitted
    assert (admit.num_computed, len(unpack(admit.tokens))) == (0, 10)
    assert request.phase is Phase.RUNNING


def test_whose_prompt_is_told_of_is_computed_anew(make: MakeScheduler) -> None:
    scheduler = make()
    add(scheduler, 12, 1)
    answer(scheduler, schedule(scheduler), 7)
    telling = Sampling(prompt_logprobs=1)
    scheduler.add(Request(b"", 0, array("i", range(12)), telling, 1))
    assert [admit.num_computed for admit in schedule(scheduler).admitted] == [0]


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "value"),
    [
        ("max_queued_requests", {"max_queued_requests": 2}, "3"),
        ("max_queued_tokens", {"max_queued_tokens": 14}, "15"),
    ],
)
def test_a_full_queue_refuses_for_now(
    make: MakeScheduler, name: str, changes: dict[str, object], value: str
) -> None:
    scheduler = make(max_num_seqs=1, **changes)
    running = add(scheduler, 5)
    schedule(scheduler)
    for _ in range(2):
        scheduler.check_room([running])
        add(scheduler, 5)
    with pytest.raises(OverloadedError) as caught:
        scheduler.check_room([running])
    assert (caught.value.parameter, caught.value.value) == (name, value)
    assert 1 <= caught.value.retry_after <= 60


def test_retry_after_follows_from_how_fast_the_queue_moves(make_config: Callable[..., EngineConfig]) -> None:
    limits = Limits(make_config(max_queued_requests=30), 16, 64)
    for last_wait, seconds in ((40.0, 10.0), (0.0, 1.0), (1000.0, 60.0)):
        with pytest.raises(OverloadedError) as caught:
            limits.check_room(40, 0, last_wait)  # ten of forty must go first
        assert caught.value.retry_after == seconds


def test_the_kv_of_the_last_token_needs_no_room(make: MakeScheduler) -> None:
    scheduler = make(num_blocks=2)
    add(scheduler, 5, 4)  # nine tokens in all
    with pytest.raises(RequestError, match="10 tokens need 3 KV blocks of 4 tokens; the cache has 2"):
        add(scheduler, 5, 5)


def test_free_slots_are_no_queue(make: MakeScheduler) -> None:
    scheduler = make(max_num_seqs=3, max_queued_requests=0, max_queued_tokens=0)
    requests = [add(scheduler, 20) for _ in range(2)]
    scheduler.check_room(requests[:1])
    with pytest.raises(OverloadedError):
        scheduler.check_room(requests)


# --- deadlines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(4))
def test_a_missed_deadline_ends_a_request_in_every_phase(make: MakeScheduler, steps: int) -> None:
    scheduler = make(max_num_batched_tokens=4)
    request = add(scheduler, 7, max_tokens=2, deadlines=Deadlines(None, None, 5.0))
    plans = []
    for step in range(steps):
        plans.append(schedule(scheduler))
        if step == 0:
            answer(scheduler, plans.pop())
    assert scheduler.next_deadline == 5.0
    assert scheduler.expire(4.9) == []
    assert scheduler.expire(5.0) == [Ended(request, FinishReason.TIMEOUT, None)]
    assert scheduler.expire(6.0) == []
    assert scheduler.stats().num_free_blocks == 16
    for plan in plans:
        outputs = answer(scheduler, plan, 7)
        assert (outputs.rows, outputs.ended) == ([], [])
    assert scheduler.schedule(0.0) is None


# --- pauses -----------------------------------------------------------------------------------------------


def test_pauses(make: MakeScheduler) -> None:
    scheduler = make()
    running = add(scheduler, 5)
    answer(scheduler, schedule(scheduler), 7)
    scheduler.paused = Pause.NEW
    waiting = add(scheduler, 5, first=50)
    assert counts_of_rows(schedule(scheduler)) == 1
    assert (running.phase, waiting.phase) == (Phase.RUNNING, Phase.WAITING)
    scheduler.reset_prefix_cache(reset_running=True)
    scheduler.paused = Pause.EVERYTHING
    assert scheduler.schedule(0.0) is None
    scheduler.paused = Pause.NOTHING
    answer(scheduler, StepPlan(1, b"", [], b"", None, None), 7)
    schedule(scheduler)
    assert (running.phase, waiting.phase) == (Phase.RUNNING, Phase.RUNNING)


def counts_of_rows(plan: StepPlan) -> int:
    return 1 if plan.slots is None else len(unpack(plan.slots))
