"""Who is to end when the workers crash: random traces in which requests crash them whenever they run."""

from __future__ import annotations

import random
from collections import deque

import pytest
from headrace.core.request import Phase, Request
from headrace.core.scheduler import Scheduler
from headrace.ipc.messages import FinishReason, StepPlan

from .plans import MakeScheduler, add, answer


def add_any(scheduler: Scheduler, choose: random.Random) -> Request:
    """Some begin with the same tokens; there are three clients and three levels."""
    return add(
        scheduler,
        choose.randint(1, 24),
        choose.randint(1, 12),
        first=choose.choice([0, 0, 50, 100]),
        client=choose.choice([b"a", b"b", b"c"]),
        priority=choose.randrange(3),
    )


@pytest.mark.parametrize("first_seed", range(0, 400, 100))
def test_only_poison_ends(make: MakeScheduler, first_seed: int) -> None:
    """The workers crash whenever the prompt of a poison is complete, and once for no reason, at any time."""
    for seed in range(first_seed, first_seed + 100):
        choose = random.Random(seed)
        scheduler = make(
            num_blocks=choose.choice([16, 24, 64]),
            max_model_len=40,
            max_num_seqs=choose.randint(1, 6),
            max_num_batched_tokens=choose.choice([8, 16, 64]),
            scheduling_policy=choose.choice(["fcfs", "priority"]),
        )
        ends = run(scheduler, choose, num_requests=choose.randint(2, 10))
        for request, (reason, is_poison) in ends.items():
            assert reason is (FinishReason.ERROR if is_poison else FinishReason.LENGTH), (seed, request)


def run(
    scheduler: Scheduler, choose: random.Random, num_requests: int
) -> dict[Request, tuple[FinishReason, bool]]:
    """How each request ended, and whether it was poison."""
    poison: set[Request] = set()
    ends: dict[Request, tuple[FinishReason, bool]] = {}
    in_flight = deque[tuple[StepPlan, list[Request]]]()
    accident, num_added, num_crashes = choose.randint(0, 12), 0, 0
    for _ in range(5000):
        if len(ends) == num_requests:
            return ends
        if num_added < num_requests and choose.random() < 0.4:
            num_added += 1
            request = add_any(scheduler, choose)
            if choose.random() < 0.3:
                poison.add(request)
        plan = scheduler.schedule(0.0)
        if plan is not None:
            in_flight.append((plan, list(scheduler._in_flight[-1].sampling)))
        if not in_flight or (plan is not None and choose.random() < 0.5):
            continue
        done, rows = in_flight.popleft()
        bad = [row for row in rows if row in poison and row.phase is not Phase.FINISHED]
        if bad or (not num_crashes and done.step >= accident and choose.random() < 0.3):
            num_crashes += 1
            assert num_crashes < 100
            in_flight.clear()
            outputs = scheduler.restart()
        else:
            outputs = answer(scheduler, done, *[1] * len(rows))
        ends |= {end.request: (end.reason, end.request in poison) for end in outputs.ended}
    raise AssertionError("somebody waits for ever")
