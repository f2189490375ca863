"""The slot table on the device against the one on the host: the same plans must bring the same tokens."""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from headrace.core.request import Request
from headrace.core.scheduler import Scheduler
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import Admit, Sampling, StepPlan, StepResult, ThinkingBudget, pack, unpack
from headrace.worker.constraints import ConstraintBuilder, Constraints
from headrace.worker.cuda_runner import run_packed
from headrace.worker.device_slots import DeviceSlots
from headrace.worker.device_step import RESULTS, DeviceStep
from headrace.worker.in_order import InOrder
from headrace.worker.logprobs import prompt_to_wire, to_wire
from headrace.worker.models import build_model
from headrace.worker.models.causal_lm import CausalLM
from headrace.worker.parallel import TensorParallel, connect
from headrace.worker.runner import ModelRunner
from headrace.worker.weights import load_weights

CPU = torch.device("cpu")
VOCAB, BLOCK, BLOCKS, SLOTS, MAX_LEN = 97, 4, 22, 6, 64
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
KINDS = (
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, seed=5),
    Sampling(temperature=0.7, seed=6, top_k=20, top_p=0.9),
    Sampling(temperature=0.9, seed=7, repetition_penalty=1.3, presence_penalty=0.5),
    Sampling(temperature=1.0, seed=8, min_tokens=4, stop_token_ids=[3, 4, 5], frequency_penalty=0.2),
    Sampling(temperature=0.0, bias_tokens=pack([7, 8]), bias_values=array("f", [0.4, -3]).tobytes()),
    Sampling(temperature=1.0, seed=9, allowed_token_ids=pack(range(20, 40)), bad_words=[[21], [30, 31]]),
    Sampling(temperature=1.0, seed=10, bad_words=[[a, b] for a in range(40) for b in range(50)]),
    Sampling(temperature=1.0, seed=11, thinking=ThinkingBudget(3, begin=60, end=61), top_k=50),
    Sampling(temperature=1.0, seed=12, logprobs=3, prompt_logprobs=2),
    Sampling(temperature=0.0, logprob_token_ids=[5, 96], frequency_penalty=0.5),
    Sampling(temperature=1.0, seed=13, logprobs=0, top_k=9, prompt_logprobs=0),
)


class OnDevice:
    """`CudaRunner` without what needs a GPU: no graphs, no events."""

    def __init__(self, model: CausalLM, config: EngineConfig, tp: TensorParallel | None = None) -> None:
        slots = DeviceSlots(CPU, SLOTS, MAX_LEN, BLOCK, BLOCKS, Constraints(ConstraintBuilder(config)))
        shape = (BLOCKS + 1, BLOCK, model.num_kv_heads, model.head_dim)
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.num_layers)]
        self.step = DeviceStep(model, caches, slots, MODEL["num_attention_heads"], tp=tp)
        self._num_results = 0

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> StepResult:
        step = self.step
        work = step.slots.apply(plan)
        logits = None if work.decode else run_packed(step, work)
        if work.decode and work.needs_host:
            logits = step.decode_logits(work.num_rows)
        elif work.decode and work.num_rows:
            step.decode(work.num_rows, filtered=work.filtered)
        shown = None if logits is None else step.draw_special(logits, work)
        row = step.results[self._num_results % RESULTS, : work.num_sampling]
        self._num_results += work.num_sampling > 0
        step.slots.constraints.expect(work.slots[work.sampling], row.numpy().tobytes)
        sampled, prompts = shown or ((), ())
        messages = prompt_to_wire(work.prompts, prompts)
        return StepResult(plan.step, row.numpy().tobytes(), [], to_wire(sampled), messages)


def agree(found: StepResult, expected: StepResult) -> None:
    """The same rows have the same logprobs, but for the last digits."""
    pairs = [(found.logprobs, expected.logprobs)]
    for one, other in zip(found.prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert one.request == other.request
        pairs.append((one.logprobs, other.logprobs))
    for mine, theirs in pairs:
        if mine is None or theirs is None:
            assert mine is theirs
            continue
        assert (mine.rows, mine.counts, mine.ranks) == (theirs.rows, theirs.counts, theirs.ranks)
        assert mine.token_ids == theirs.token_ids
        values = [np.frombuffer(columns.values, np.float32) for columns in (mine, theirs)]
        np.testing.assert_allclose(values[0], values[1], atol=1e-5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(2))
def test_both_tables_bring_the_same_tokens(seed: int, make_config: Any) -> None:
    config = make_config(
        hf_config=MODEL,
        architecture="LlamaForCausalLM",
        load_format="dummy",
        max_model_len=MAX_LEN,
        max_num_seqs=SLOTS,
        max_num_batched_tokens=24,
        num_gpu_blocks_override=BLOCKS,
        vocab_size=VOCAB,
    )
    host = InOrder(config, ModelRunner(config, 0, ""))
    host.load(lambda phase: None)
    host.allocate(BLOCKS, MAX_LEN)
    model = build_model("LlamaForCausalLM", MODEL, torch.float32, CPU, TensorParallel(), MAX_LEN)
    load_weights(model, config, CPU, TensorParallel())
    device = OnDevice(model, config)

    rng = random.Random(seed)
    scheduler = Scheduler(config, BLOCKS, MAX_LEN)
    requests = 0
    in_flight: deque[StepResult] = deque()
    preempted = steady = 0
    for now in range(400):
        if requests < 24 and rng.random() < 0.2:
            prompt = unpack(pack(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))))
            kind = KINDS[requests % len(KINDS)]
            scheduler.add(Request(b"", requests, prompt, kind, max_tokens=rng.randrange(1, 24)))
            requests += 1
        plan = scheduler.schedule(float(now))
        if plan is not None:
            expected, found = host.submit(plan).result(), device.submit(plan)
            assert found.tokens == expected.tokens, f"step {plan.step}"
            agree(found, expected)
            in_flight.append(expected)
            steady += plan.slots is None
        if in_flight and (plan is None or rng.random() < 0.5):
            scheduler.update(in_flight.popleft())
        preempted = scheduler.stats().num_preemptions
    assert requests == 24
    assert scheduler.stats().num_running == scheduler.stats().num_waiting == 0
    assert preempted
    assert steady


def test_ranks_take_the_first_ones_tokens(make_config: Any, tmp_path: Path) -> None:
    """Where sampling has many stages. The ranks' models differ here as their roundings may."""

    def run(rank: int) -> list[bytes]:
        config = make_config(
            hf_config=MODEL, architecture="LlamaForCausalLM", load_format="dummy", seed=rank, vocab_size=VOCAB
        )
        model = build_model("LlamaForCausalLM", MODEL, torch.float32, CPU, TensorParallel(), MAX_LEN)
        load_weights(model, config, CPU, TensorParallel())
        device = OnDevice(model, config, connect(rank, 2, CPU, str(tmp_path / "ranks")))
        admit = Admit(0, pack([1, 2, 3]), 3, 0, pack(range(8)), KINDS[2])
        plans = [StepPlan(0, b"", [admit], b"", pack([0]), pack([3]))]
        plans += [StepPlan(step, b"", [], b"", None, pack([1])) for step in range(1, 9)]
        return [device.submit(plan).tokens for plan in plans]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert first == second
    assert len(set(first)) > 1
