"""Logprobs in the core: a step brings no more than a message can carry; what does not fit is seen."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from headrace.core.clients import Splitter
from headrace.core.logprobs import MAX_ENTRIES
from headrace.core.request import Request
from headrace.core.scheduler import Scheduler
from headrace.core.steps import BadResultError
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import Logprobs, PromptLogprobs, Sampling, StepResult, pack, unpack

VOCAB = 1 << 18


@pytest.fixture
def scheduler(make_config: Callable[..., EngineConfig]) -> Scheduler:
    config = make_config(vocab_size=VOCAB, max_num_batched_tokens=600, max_num_seqs=32, max_model_len=2000)
    return Scheduler(config, 2000, 2000)


def add(
    scheduler: Scheduler, sampling: Sampling, length: int = 4, client: bytes = b"a", number: int = 0
) -> Request:
    request = Request(client, number, array("i", range(length)), sampling, 5)
    scheduler.add(request)
    return request


def columns(rows: list[int], entries: int = 2) -> Logprobs:
    total = len(rows) * entries
    return Logprobs(
        pack(rows), pack([entries] * len(rows)), pack(range(total)), bytes(4 * total), pack([1] * total)
    )


def test_prompts_are_cut_so_that_their_logprobs_can_travel(scheduler: Scheduler) -> None:
    """256 positions a step with few entries; with the whole vocabulary as many as fit; both together too."""
    add(scheduler, Sampling(prompt_logprobs=5), 500)
    add(scheduler, Sampling(prompt_logprobs=5), 500, number=1)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert sum(unpack(plan.num_tokens or b"")) == 256
    scheduler.abort(scheduler._running()[0])
    add(scheduler, Sampling(prompt_logprobs=VOCAB), 500, number=2)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    assert sum(unpack(plan.num_tokens or b"")) <= 256


def test_only_so_many_run_that_their_logprobs_can_travel(scheduler: Scheduler) -> None:
    most = MAX_ENTRIES // (1 + VOCAB)
    for number in range(most + 3):
        add(scheduler, Sampling(logprobs=VOCAB), number=number)
    assert scheduler.schedule(0.0) is not None
    assert scheduler.stats().num_running == most
    scheduler.abort(scheduler._running()[0])
    assert scheduler.schedule(0.0) is not None
    assert scheduler.stats().num_running == most


def test_each_client_gets_its_rows(scheduler: Scheduler) -> None:
    wanted = Sampling(logprobs=1, prompt_logprobs=1)
    add(scheduler, Sampling(), client=b"a", number=1)
    asking = [add(scheduler, wanted, client=client, number=2) for client in (b"a", b"b")]
    plan = scheduler.schedule(0.0)
    assert plan is not None
    result = StepResult(
        plan.step,
        pack([7, 8, 9]),
        [],
        columns([1, 2]),
        [PromptLogprobs(1, columns([1, 2, 3])), PromptLogprobs(2, columns([1, 2, 3]))],
    )
    outputs = scheduler.update(result)
    messages = Splitter().split(outputs)
    first, second = messages[b"a"].logprobs, messages[b"b"].logprobs
    assert first is not None
    assert second is not None
    # Whose turn came first is the queue's to say.
    ids = [[2 * row - 2, 2 * row - 1] for row in map(outputs.rows.index, asking)]
    assert (list(unpack(first.rows)), list(unpack(first.token_ids))) == ([1], ids[0])
    assert (list(unpack(second.rows)), list(unpack(second.token_ids))) == ([0], ids[1])
    assert messages[b"b"].prompt_logprobs == [PromptLogprobs(2, columns([1, 2, 3]))]
    # All of the prompt's are there: should it run again, it may read the cache.
    assert [request.sampling.prompt_logprobs for request in asking] == [None, None]


def test_nothing_is_told_of_the_prompt_of_an_aborted_request(scheduler: Scheduler) -> None:
    gone = add(scheduler, Sampling(prompt_logprobs=1))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.abort(gone)
    prompts = [PromptLogprobs(0, columns([1, 2, 3]))]
    assert not scheduler.update(StepResult(plan.step, pack([7]), prompt_logprobs=prompts)).prompt_logprobs


@pytest.mark.parametrize(
    ("logprobs", "prompts"),
    [
        (columns([3]), []),
        (columns([-1]), []),
        (Logprobs(pack([0]), pack([3]), pack([1]), bytes(4), pack([1])), []),
        (Logprobs(pack([0]), pack([-1]), b"", b"", b""), []),
        (Logprobs(pack([0]), b"abc", b"", b"", b""), []),
        (None, [PromptLogprobs(0, columns([1]))]),
        (None, [PromptLogprobs(9, columns([1]))]),
        (None, [PromptLogprobs(1, columns([]))]),
    ],
)
def test_what_does_not_fit_is_a_bad_result(
    scheduler: Scheduler, logprobs: Logprobs | None, prompts: list[PromptLogprobs]
) -> None:
    add(scheduler, Sampling(logprobs=1))
    first = scheduler.schedule(0.0)
    assert first is not None
    scheduler.update(StepResult(first.step, pack([7])))
    add(scheduler, Sampling(prompt_logprobs=1), number=1)
    plan = scheduler.schedule(0.0)
    assert plan is not None
    with pytest.raises(BadResultError):
        scheduler.update(StepResult(plan.step, pack([7, 8]), [], logprobs, prompts))
