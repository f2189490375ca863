"""Rows that want more than temperature, on the GPU as on the CPU: the same tokens, and logprobs that agree.

Every request's tokens are settled by a rule and not by near-ties, so that both devices take the same way.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest
from headrace.core.request import Request
from headrace.core.scheduler import Scheduler
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import Logprobs, Sampling, StepResult, ThinkingBudget, pack, unpack
from headrace.worker.cuda_runner import CudaRunner
from headrace.worker.in_order import InOrder
from headrace.worker.runner import ModelRunner

from .peers import VOCAB, make_peer

MakeConfig: TypeAlias = Callable[..., EngineConfig]
FORCED: dict[str, Any] = {"bias_tokens": pack([17]), "bias_values": array("f", [1e4]).tobytes()}
KINDS = (
    Sampling(temperature=0.0, logprobs=3, prompt_logprobs=2, **FORCED),
    Sampling(temperature=1.0, seed=5, logprob_token_ids=[5, 9], repetition_penalty=1.3, **FORCED),
    Sampling(temperature=0.7, seed=6, top_k=5, top_p=0.9, allowed_token_ids=pack([17]), logprobs=0),
    Sampling(temperature=1.0, seed=7, frequency_penalty=0.5, bad_words=[[18], [17, 19]], **FORCED),
    Sampling(temperature=1.0, seed=8, thinking=ThinkingBudget(2, begin=17, end=18), logprobs=1, **FORCED),
    Sampling(temperature=0.0, min_tokens=4, stop_token_ids=[17], allowed_token_ids=pack([17, 18]), **FORCED),
)
FILTERED = (
    Sampling(temperature=1.0, seed=9, top_k=1),
    Sampling(temperature=0.8, seed=10, top_p=1e-6),
    Sampling(temperature=1.5, seed=11, min_p=1.0),
    Sampling(temperature=2.0, seed=12, top_k=20, top_p=1e-6, min_p=0.1),
    Sampling(temperature=0.0),
)
"""What is left to draw from is one token: steps of these alone are CUDA graphs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_peer("llama", tmp_path_factory.mktemp("model")).folder)


def start(runner: Any, config: EngineConfig, num_blocks: int) -> Any:
    runner.load(lambda phase: None)
    runner.allocate(num_blocks, config.max_model_len)
    runner.warm_up()
    return runner


def close(mine: Logprobs, theirs: Logprobs) -> bool:
    """Of the same rows, and of values that differ by rounding; near-ties among the likeliest may swap."""
    assert (mine.rows, mine.counts) == (theirs.rows, theirs.counts)
    values = [np.frombuffer(columns.values, np.float32) for columns in (mine, theirs)]
    return bool(np.abs(values[0] - values[1]).max() < 0.05)


def compare(found: StepResult, expected: StepResult) -> int:
    assert found.tokens == expected.tokens, f"step {expected.step}"
    assert (found.logprobs is None) == (expected.logprobs is None)
    pairs = [(found.logprobs, expected.logprobs)] if found.logprobs and expected.logprobs else []
    for one, other in zip(found.prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert one.request == other.request
        pairs.append((one.logprobs, other.logprobs))
    assert all(close(*pair) for pair in pairs)
    return len(pairs)


@pytest.mark.parametrize(
    ("kinds", "enforce_eager"),
    [(KINDS, False), (KINDS, True), (FILTERED, False)],
    ids=["", "eager", "filters"],
)
def test_special_rows_are_as_on_the_cpu(
    folder: Path, gpu_config: MakeConfig, kinds: tuple[Sampling, ...], enforce_eager: bool
) -> None:
    config = gpu_config(
        folder,
        dtype="float32",
        num_gpu_blocks_override=20,
        max_num_batched_tokens=48,
        enforce_eager=enforce_eager,
    )
    on_cpu = msgspec.structs.replace(config, device="cpu")
    device = start(CudaRunner(config, 0, ""), config, 20)
    host = start(InOrder(on_cpu, ModelRunner(on_cpu, 0, "")), on_cpu, 20)
    rng, scheduler = random.Random(1), Scheduler(config, 20, config.max_model_len)
    under_way: deque[tuple[Any, StepResult]] = deque()
    number = compared = 0
    while number < 30 or under_way or scheduler.stats().num_running or scheduler.stats().num_waiting:
        if number < 30 and rng.random() < 0.6:
            prompt = unpack(pack(rng.randrange(20, VOCAB) for _ in range(rng.choice([1, 2, 17, 60, 100]))))
            kind = kinds[number % len(kinds)]
            scheduler.add(Request(b"", number, prompt, kind, max_tokens=rng.randrange(8, 60)))
            number += 1
        plan = scheduler.schedule(0.0)
        if plan is not None:
            under_way.append((device.submit(plan), host.submit(plan).result()))
        elif under_way:
            pending, expected = under_way.popleft()
            compared += compare(pending.result(), expected)
            scheduler.update(expected)
    assert compared > 100 or kinds is FILTERED
    assert scheduler.stats().num_preemptions
