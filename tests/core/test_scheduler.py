"""The scheduler's rules one by one: what goes into a plan, in which order, and what is refused."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable

import pytest
from headrace.core.request import Phase, Request
from headrace.core.scheduler import Scheduler
from headrace.core.steps import BadResultError, Ended, Outputs
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import ErrorInfo, RequestError
from headrace.ipc.messages import FailedRow, FinishReason, Sampling, StepPlan, StepResult, pack, unpack

from .plans import MakeScheduler, add, answer, counts, schedule

MakeConfig = Callable[..., EngineConfig]


def test_steady_decoding_sends_no_columns(make: MakeScheduler) -> None:
    scheduler = make()
    request = add(scheduler, 6)
    first, second = schedule(scheduler), schedule(scheduler)
    assert [admit.slot for admit in first.admitted] == list(unpack(first.slots or b"")) == [request.slot]
    assert counts(first) == [6]
    # The prompt's row goes on alone: the same rows, one token each, before its first token is known.
    assert (second.slots, second.num_tokens, second.admitted) == (None, None, [])
    assert scheduler.schedule(0.0) is None  # two are in flight
    assert list(answer(scheduler, first, 7).tokens) == [7]
    third = schedule(scheduler)
    assert (third.slots, third.num_tokens, third.granted) == (None, None, b"")
    answer(scheduler, second, 7)
    answer(scheduler, third, 7)
    fourth = schedule(scheduler)  # position 8: a third block
    assert list(unpack(fourth.granted)) == [request.slot, request.block_table[2]]


def test_prompts_get_a_share_of_the_budget_while_others_decode(make: MakeScheduler) -> None:
    scheduler = make(num_blocks=2048, max_num_batched_tokens=4096, max_model_len=6000)
    add(scheduler, 3000)
    add(scheduler, 5000, first=1)
    first, second = schedule(scheduler), schedule(scheduler)
    assert counts(first) == [3000, 1096]  # nobody decodes
    assert counts(second) == [1, 1024]
    answer(scheduler, first, 7)
    assert counts(schedule(scheduler)) == [1, 1024]


def test_a_prompt_under_way_keeps_a_block_to_grow_into(make: MakeScheduler) -> None:
    scheduler = make(num_blocks=12, max_num_batched_tokens=16, enable_prefix_caching=False)
    add(scheduler, 40)  # ten blocks
    for _ in range(2):
        answer(scheduler, schedule(scheduler))
    add(scheduler, 8, first=100)  # the other two
    assert counts(schedule(scheduler)) == [8]


def test_whole_prompts_have_no_share(make: MakeScheduler) -> None:
    options = {"max_num_batched_tokens": 4096, "max_model_len": 6000, "enable_chunked_prefill": False}
    scheduler = make(num_blocks=2048, **options)
    add(scheduler, 4)
    schedule(scheduler)
    add(scheduler, 4000, first=1)
    assert counts(schedule(scheduler)) == [1, 4000]


def test_ranks_make_the_share_larger(make: MakeScheduler) -> None:
    for ranks, share in ((2, 2048), (4, 4095)):
        options = {"max_num_batched_tokens": 4096, "max_model_len": 8000, "tensor_parallel_size": ranks}
        scheduler = make(num_blocks=4096, **options)
        add(scheduler, 4)
        schedule(scheduler)
        add(scheduler, 7000, first=1)
        assert counts(schedule(scheduler)) == [1, share]


def test_a_small_budget_is_not_divided(make: MakeScheduler) -> None:
    scheduler = make(num_blocks=256, max_num_batched_tokens=600, max_model_len=1000)
    add(scheduler, 4)
    add(scheduler, 900, first=1)
    assert counts(schedule(scheduler)) == [4, 596]
    assert counts(schedule(scheduler)) == [1, 304]


def test_a_request_that_the_worker_gives_up_ends_alone(make: MakeScheduler) -> None:
    scheduler = make()
    first, second = add(scheduler, 5), add(scheduler, 5, first=50)
    plan, surplus = schedule(scheduler), schedule(scheduler)
    error = ErrorInfo("request", "no such grammar")
    outputs = scheduler.update(StepResult(plan.step, pack([7, 8]), [FailedRow(0, error)]))
    assert outputs.ended == [Ended(first, FinishReason.ERROR, None, error)]
    assert (outputs.rows, list(outputs.tokens)) == ([second], [8])
    outputs = scheduler.update(StepResult(surplus.step, pack([7, 8]), [FailedRow(0, error)]))
    assert (outputs.rows, outputs.ended) == ([second], [])


def test_the_same_rows_object_while_composition_stays(make: MakeScheduler) -> None:
    scheduler = make()
    add(scheduler, 5)
    add(scheduler, 6, first=50)
    plans = [schedule(scheduler), schedule(scheduler)]
    rows = answer(scheduler, plans[0], 1, 2).rows
    assert len(rows) == 2
    assert answer(scheduler, plans[1], 1, 2).rows is rows


def test_no_plan_runs_beyond_max_tokens(make: MakeScheduler) -> None:
    scheduler = make()
    request = add(scheduler, 5, max_tokens=2)
    first, second = schedule(scheduler), schedule(scheduler)
    assert request.phase is Phase.DRAINING
    assert scheduler.stats().num_free_blocks == 16  # its last plan is sent: all is free already
    answer(scheduler, first, 7)
    assert scheduler.schedule(0.0) is None
    (ended,) = answer(scheduler, second, 7).ended
    assert ended == Ended(request, FinishReason.LENGTH, None)


def test_the_context_length_ends_a_request(make: MakeScheduler) -> None:
    scheduler = make(max_model_len=6)
    request = add(scheduler, 5, max_tokens=100)
    (ended,) = answer(scheduler, schedule(scheduler), 7).ended
    assert ended == Ended(request, FinishReason.LENGTH, None)
    assert scheduler.schedule(0.0) is None


@pytest.mark.parametrize("grammar", [None, "start: /a*/"])
def test_a_grammar_may_end_the_text_before_min_tokens(make: MakeScheduler, grammar: str | None) -> None:
    scheduler = make()
    sampling = Sampling(eos_token_id=900, min_tokens=3, grammar=grammar)
    scheduler.add(Request(b"", 0, array("i", [1, 2]), sampling, 8))
    assert bool(answer(scheduler, schedule(scheduler), 900).ended) == (grammar is not None)


def test_only_the_prompt_of_a_replay_counts_as_cached(make: MakeScheduler) -> None:
    scheduler = make()
    add(scheduler, 12, 1)
    answer(scheduler, schedule(scheduler), 7)
    replay = add(scheduler, 12, num_prompt_tokens=5)
    assert [admit.num_computed for admit in schedule(scheduler).admitted] == [8]
    assert replay.num_cached_tokens == scheduler.stats().prefix_cache_hits == 5


@pytest.mark.parametrize(("token", "stop"), [(900, None), (901, 901)])
def test_a_stop_token_drops_the_token_behind_it(make: MakeScheduler, token: int, stop: int | None) -> None:
    scheduler = make()
    request, other = add(scheduler, 5), add(scheduler, 5, first=50)
    first, second = schedule(scheduler), schedule(scheduler)
    outputs = answer(scheduler, first, token, 7)
    assert list(outputs.tokens) == [token, 7]
    assert outputs.ended == [Ended(request, FinishReason.STOP, stop)]
    late = answer(scheduler, second, 7, 8)
    assert (late.rows, list(late.tokens), late.ended) == ([other], [8], [])
    third = schedule(scheduler)
    assert len(unpack(third.released)) == 1
    assert list(unpack(third.slots or b"")) == [other.slot]


def test_min_tokens_holds_a_stop_token_back(make: MakeScheduler) -> None:
    scheduler = make()
    add(scheduler, 5, min_tokens=2)
    for expected in ([], [], [FinishReason.STOP]):
        outputs = answer(scheduler, schedule(scheduler), 900)
        assert [ended.reason for ended in outputs.ended] == expected


def test_decodes_come_first_and_prompts_share_the_rest(make: MakeScheduler) -> None:
    scheduler = make(max_num_batched_tokens=8)
    add(scheduler, 2)
    answer(scheduler, schedule(scheduler), 7)
    add(scheduler, 10, first=50)
    add(scheduler, 3, first=70)
    assert counts(schedule(scheduler)) == [1, 7]
    assert counts(schedule(scheduler)) == [1, 3, 3]


def test_without_chunked_prefill_a_prompt_runs_whole(make: MakeScheduler) -> None:
    scheduler = make(max_num_batched_tokens=8, enable_chunked_prefill=False)
    add(scheduler, 6)
    add(scheduler, 6, first=50)
    assert counts(schedule(scheduler)) == [6]
    assert counts(schedule(scheduler)) == [1, 6]


def test_a_prefix_of_the_same_plan_is_shared(make: MakeScheduler) -> None:
    scheduler = make()
    first, second = add(scheduler, 12), add(scheduler, 12)
    plan = schedule(scheduler)
    # 12 tokens are three full blocks, but the last token is always computed.
    assert counts(plan) == [12, 4]
    assert second.num_cached_tokens == plan.admitted[1].num_computed == 8
    assert first.block_table[:2] == second.block_table[:2]


def test_prefix_caching_can_be_off(make: MakeScheduler) -> None:
    scheduler = make(enable_prefix_caching=False)
    first, second = add(scheduler, 12), add(scheduler, 12)
    assert counts(schedule(scheduler)) == [12, 12]
    assert not set(first.block_table) & set(second.block_table)


def test_generated_tokens_are_cached_too(make: MakeScheduler) -> None:
    scheduler = make()
    request = add(scheduler, 4, max_tokens=6)
    while (plan := scheduler.schedule(0.0)) is not None:
        answer(scheduler, plan, 7)
    again = Request(b"", 0, request.tokens[:], Sampling(), 1)
    scheduler.add(again)
    schedule(scheduler)
    assert again.num_cached_tokens == 8


def test_priority_orders_the_queue_only_when_asked(make: MakeScheduler) -> None:
    for policy, expected in (("fcfs", [0, 1]), ("priority", [1, 0])):
        scheduler = make(max_num_seqs=1, scheduling_policy=policy)
        requests = [add(scheduler, 5, 1, priority=2), add(scheduler, 5, 1, first=50, priority=1)]
        order: list[int] = []
        while (plan := scheduler.schedule(0.0)) is not None:
            order += [requests.index(request) for request in answer(scheduler, plan, 7).started]
        assert order == expected


def test_the_last_in_order_is_preempted_and_recomputed(make: MakeScheduler) -> None:
    scheduler = make(num_blocks=5, max_model_len=20, enable_prefix_caching=False)
    first, second = add(scheduler, 7), add(scheduler, 6, first=50)
    plans = [schedule(scheduler), schedule(scheduler)]
    for token in (20, 21):
        answer(scheduler, plans.pop(0), token, 30 + token)
    plan = schedule(scheduler)  # the first takes the last block for position 8
    assert list(unpack(plan.granted)) == [first.slot, first.block_table[2]]
    slot = second.slot
    ahead = schedule(scheduler)  # the second needs one for its position 8 and gives up its own instead
    assert second.phase is Phase.PREEMPTED
    assert list(unpack(ahead.released)) == [slot]
    assert list(answer(scheduler, plan, 22, 52).tokens) == [22, 52]  # what was on its way still counts
    answer(scheduler, ahead, 23)
    scheduler.abort(first)
    (admit,) = schedule(scheduler).admitted
    assert list(unpack(admit.tokens)) == [*range(50, 56), 50, 51, 52]
    assert (admit.num_prompt_tokens, admit.num_computed) == (6, 0)
    assert scheduler.stats().num_preemptions == 1


@pytest.mark.parametrize("steps", range(4))
def test_abort_frees_at_once_in_every_phase(make: MakeScheduler, steps: int) -> None:
    """After 0 steps it waits, after 1 it is inside its prompt, after 2 it decodes, after 3 it drains."""
    scheduler = make(max_num_batched_tokens=4)
    request = add(scheduler, 7, max_tokens=2)
    plans = []
    for step in range(steps):
        plans.append(schedule(scheduler))
        if step == 0:
            answer(scheduler, plans.pop())
    assert request.phase is [Phase.WAITING, Phase.RUNNING, Phase.RUNNING, Phase.DRAINING][steps]
    scheduler.abort(request)
    scheduler.abort(request)
    assert scheduler.stats().num_free_blocks == 16
    for plan in plans:
        outputs = answer(scheduler, plan, 7)
        assert (outputs.rows, outputs.started, outputs.ended) == ([], [], [])
    assert scheduler.schedule(0.0) is None
    assert scheduler.reset_prefix_cache()


def test_aborted_requests_do_not_pile_up_in_the_queue(make: MakeScheduler) -> None:
    scheduler = make(max_num_seqs=1)
    blocker = add(scheduler, 5)
    schedule(scheduler)
    waiting = [add(scheduler, 5) for _ in range(1000)]
    for request in waiting:
        scheduler.abort(request)
    assert scheduler.stats().num_waiting == 0
    assert len(scheduler._queue) == 0
    scheduler.abort(blocker)


@pytest.mark.parametrize(
    ("length", "max_tokens", "changes", "words"),
    [
        (64, 1, {}, ["64 tokens", "max_model_len 64", "63"]),
        (40, 30, {"max_model_len": 100}, ["40", "30", "70 tokens", "18 KV blocks of 4", "16 (64 tokens)"]),
        (20, 1, {"max_num_batched_tokens": 8, "enable_chunked_prefill": False}, ["20 tokens", "tokens 8"]),
    ],
)
def test_what_can_never_run_is_refused_with_the_arithmetic(
    make: MakeScheduler, length: int, max_tokens: int, changes: dict[str, object], words: list[str]
) -> None:
    scheduler = make(**changes)
    with pytest.raises(RequestError) as caught:
        add(scheduler, length, max_tokens)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.parameter in ("prompt", "max_tokens")
    assert caught.value.value is not None
    assert caught.value.limit is not None
    assert scheduler.stats().num_waiting == 0


def test_a_result_out_of_order_is_an_error(make: MakeScheduler) -> None:
    scheduler = make()
    with pytest.raises(BadResultError, match="expected none"):
        scheduler.update(StepResult(0, b""))
    add(scheduler, 5)
    plan = schedule(scheduler)
    with pytest.raises(BadResultError, match="step 0 with 2; expected 0 with 1 tokens"):
        answer(scheduler, plan, 1, 2)


def test_a_result_that_cannot_be_is_not_used(make: MakeScheduler) -> None:
    scheduler = make()
    request = add(scheduler, 5)
    plan = schedule(scheduler)
    for result, names in (
        (StepResult(plan.step + 1, pack([1])), "step 1 with 1"),
        (StepResult(plan.step, pack([1000])), "out of the vocabulary"),
        (StepResult(plan.step, pack([-1])), "out of the vocabulary"),
        (StepResult(plan.step, pack([1]), [FailedRow(1, ErrorInfo("request", "no"))]), "rows"),
    ):
        with pytest.raises(BadResultError, match=names):
            scheduler.update(result)
    assert list(answer(scheduler, plan, 1).tokens) == [1]
    assert request.num_output_tokens == 1


# --- new workers -----------------------------------------------------------------------------------------


def test_a_restart_puts_everything_back(make: MakeScheduler) -> None:
    """A draining, a decoding and a prefilling request, and one that waits: all run again, in their order."""
    scheduler = make(max_num_seqs=3, max_num_batched_tokens=8)
    draining, decoding = add(scheduler, 4, max_tokens=2), add(scheduler, 4, first=20)
    first = schedule(scheduler)
    prefilling, waiting = add(scheduler, 12, first=40), add(scheduler, 4, first=60)
    schedule(scheduler)
    assert answer(scheduler, first, 7, 8).started == [draining, decoding]
    assert draining.phase is Phase.DRAINING
    outputs = scheduler.restart()
    assert (outputs.rows, outputs.started, outputs.ended) == ([], [prefilling], [])
    assert scheduler.stats().num_free_blocks == 16
    assert scheduler.stats().num_replays == 3
    assert scheduler.num_in_flight == 0
    again = schedule(scheduler)  # the two that had tokens go together, the suspect prefill alone
    assert [list(unpack(admit.tokens)) for admit in again.admitted] == [[0, 1, 2, 3, 7], [20, 21, 22, 23, 8]]
    assert again.released == b""
    assert [admit.num_computed for admit in again.admitted] == [0, 0]
    ended = answer(scheduler, again, 70).ended  # the second has a chunk only
    assert [end.request for end in ended] == [draining]
    assert (prefilling.phase, waiting.phase) == (Phase.PREEMPTED, Phase.WAITING)


def crash_until_ended(scheduler: Scheduler, poison: Request, generated: int) -> tuple[int, list[Outputs]]:
    """Workers that crash in every step that samples the poison's token number `generated`."""
    crashes, ends, in_flight = 0, [], deque[tuple[StepPlan, list[Request]]]()
    while poison.phase is not Phase.FINISHED:
        plan = scheduler.schedule(0.0)
        if plan is not None:
            rows = list(scheduler._in_flight[-1].sampling)
            in_flight.append((plan, rows))
        done, rows = in_flight.popleft()
        if poison in rows and poison.num_output_tokens == generated:
            crashes += 1
            ends.append(scheduler.restart())
            in_flight.clear()
        else:
            ends.append(answer(scheduler, done, *[1] * len(rows)))
    return crashes, ends


@pytest.mark.parametrize(("generated", "crashes"), [(0, 2), (3, 3)])
def test_a_poison_request_is_found_out(make: MakeScheduler, generated: int, crashes: int) -> None:
    """At its first replay when its prompt is the poison; others beside it never end."""
    scheduler = make(num_blocks=64, max_num_seqs=8)
    crowd = [add(scheduler, 4, 12, first=10 * number) for number in range(6)]
    poison = crowd[2]
    number, outputs = crash_until_ended(scheduler, poison, generated)
    assert number == crashes
    (end,) = [end for each in outputs for end in each.ended if end.reason is FinishReason.ERROR]
    assert end.request is poison
    assert end.error is not None
    assert end.error.kind == "crashed"
    while (plan := scheduler.schedule(0.0)) is not None:
        answer(scheduler, plan, *[1] * len(scheduler._in_flight[0].sampling))
    for request in crowd:
        assert request is poison or request.num_output_tokens == 12


def test_who_gets_further_is_not_blamed(make: MakeScheduler) -> None:
    """A crash every third step, for ever: the request ends as if there were none."""
    scheduler = make(num_blocks=64)
    request = add(scheduler, 4, 40)
    for number in range(1, 1000):
        plan = scheduler.schedule(0.0)
        if plan is None:
            break
        if number % 3 == 0:
            assert not scheduler.restart().ended
        elif scheduler.num_in_flight:
            answer(scheduler, plan, 1)
    assert request.num_output_tokens == 40


def test_nobody_else_runs_beside_suspects(make: MakeScheduler) -> None:
    """An accident, and then the poison of another client, whose turn it would be by its share."""
    scheduler = make(num_blocks=64, max_num_seqs=2)
    innocent = [add(scheduler, 4, 12, client=b"a", first=20 * number) for number in range(2)]
    plans = [schedule(scheduler)]
    poison = add(scheduler, 4, 12, client=b"b", first=60)
    for _ in range(5):
        plans.append(schedule(scheduler))
        answer(scheduler, plans.pop(0), 1, 1)
    assert poison.share.num_tokens < innocent[0].share.num_tokens
    assert not scheduler.restart().ended
    _, outputs = crash_until_ended(scheduler, poison, 0)
    assert [end.request for each in outputs for end in each.ended if end.error] == [poison]
    while (plan := scheduler.schedule(0.0)) is not None:
        answer(scheduler, plan, *[1] * len(scheduler._in_flight[0].sampling))
    assert [request.num_output_tokens for request in innocent] == [12, 12]


def test_a_suspect_is_cleared_when_it_is_past_all_that_was_in_flight(make: MakeScheduler) -> None:
    """Two plans were: the second may have been the one that crashed."""
    scheduler = make()
    request = add(scheduler, 4)
    for _ in range(2):
        schedule(scheduler)
    scheduler.restart()
    suspected = []
    for _ in range(3):
        suspected.append(request.suspicion is not None)
        answer(scheduler, schedule(scheduler), 7)
    assert suspected == [True, True, False]


def test_no_replays_when_none_are_allowed(make: MakeScheduler) -> None:
    scheduler = make(max_replays=0)
    running, waiting = add(scheduler, 4), None
    schedule(scheduler)
    waiting = add(scheduler, 4)
    assert [end.request for end in scheduler.restart().ended] == [running]
    assert scheduler.stats().num_replays == 0
    assert [admit.slot for admit in schedule(scheduler).admitted] == [waiting.slot]
