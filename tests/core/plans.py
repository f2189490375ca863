"""Requests, plans and answers in the fewest words, for tests of the scheduler."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from headrace.core.request import Request
from headrace.core.scheduler import Scheduler
from headrace.core.steps import Outputs
from headrace.ipc.messages import Sampling, StepPlan, StepResult, pack, unpack

MakeScheduler = Callable[..., Scheduler]


def add(
    scheduler: Scheduler,
    length: int,
    max_tokens: int = 8,
    *,
    first: int = 0,
    min_tokens: int = 0,
    priority: int = 0,
    client: bytes = b"",
    arrival: float = 0.0,
    skip: bool = False,
    **changes: Any,
) -> Request:
    """A request whose prompt counts up from `first`."""
    sampling = Sampling(
        eos_token_id=900, stop_token_ids=[901], min_tokens=min_tokens, skip_reading_prefix_cache=skip
    )
    tokens = array("i", range(first, first + length))
    request = Request(client, 0, tokens, sampling, max_tokens, priority, arrival, **changes)
    scheduler.add(request)
    return request


def schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule(0.0)
    assert plan is not None
    return plan


def counts(plan: StepPlan) -> list[int]:
    assert plan.num_tokens is not None
    return list(unpack(plan.num_tokens))


def answer(scheduler: Scheduler, plan: StepPlan, *tokens: int) -> Outputs:
    return scheduler.update(StepResult(plan.step, pack(tokens)))
