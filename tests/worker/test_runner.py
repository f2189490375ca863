"""The runner with a tiny Llama: transformers' greedy tokens under any batching, and its layouts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import Admit, Sampling, StepPlan, pack
from headrace.worker.runner import ModelRunner
from headrace.worker.slots import Slots
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from tests.worker.conftest import MakeConfig, Request, StartWorker, Traffic

VOCAB = 1000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a random float32 Llama, and the model in transformers."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def config(llama: tuple[Path, Any], make_config: MakeConfig) -> EngineConfig:
    folder, model = llama
    hf_config = model.config.to_dict()
    return make_config(model_path=str(folder), load_format="safetensors", hf_config=hf_config)


@pytest.fixture
def runner(config: EngineConfig) -> Iterator[ModelRunner]:
    threads = torch.get_num_threads()
    runner = ModelRunner(config, 0, "")
    size = runner.load(lambda phase: logging.info(phase))
    runner.allocate(size.num_blocks, config.max_model_len)
    runner.warm_up()
    yield runner
    torch.set_num_threads(threads)


@pytest.fixture
def step(runner: ModelRunner) -> Callable[[StepPlan], list[int]]:
    slots = Slots(8, 256, 4, 256)

    def run(plan: StepPlan) -> list[int]:
        batch = slots.apply(plan)
        tokens = runner.execute(slots, batch).tokens
        slots.commit(batch, tokens)
        return list(tokens.tolist())

    return run


@torch.inference_mode()
def is_greedy(model: Any, request: Request) -> bool:
    """Every output token is transformers' most likely one after all before it."""
    logits = model(torch.tensor([request.tokens])).logits[0]
    first = len(request.prompt) - 1
    return bool(logits[first:-1].argmax(-1).tolist() == request.output)


def test_random_plans_give_transformers_greedy_tokens(
    llama: tuple[Path, Any], step: Callable[[StepPlan], list[int]], traffic: Traffic
) -> None:
    requests = [request for request in traffic.run(200, step) if request.output]
    assert sum(len(request.output) for request in requests) > 200
    assert all(is_greedy(llama[1], request) for request in requests)


def test_worker_processes_of_two_ranks_give_the_same_tokens(
    llama: tuple[Path, Any], config: EngineConfig, start_worker: StartWorker, traffic: Traffic
) -> None:
    changes = {"load_format": "safetensors", "model_path": config.model_path, "hf_config": config.hf_config}
    first, second = (start_worker(rank, tensor_parallel_size=2, **changes) for rank in range(2))
    first.start([second])

    def step(plan: StepPlan) -> list[int]:
        second.pipe.send(plan)
        return first.step(plan)

    requests = [request for request in traffic.run(60, step) if request.output]
    assert sum(len(request.output) for request in requests) > 60
    assert all(is_greedy(llama[1], request) for request in requests)


def test_a_prefix_hit_within_one_plan(llama: tuple[Path, Any], step: Callable[[StepPlan], list[int]]) -> None:
    greedy = Sampling(temperature=0.0)
    tokens = list(range(5, 14))
    admitted = [
        Admit(0, pack(tokens), 9, 0, pack([3, 7, 9]), greedy),
        Admit(1, pack(tokens), 9, 8, pack([3, 7, 10]), greedy),
    ]
    sampled = step(StepPlan(0, b"", admitted, b"", pack([0, 1]), pack([9, 1])))
    with torch.inference_mode():
        expected = int(llama[1](torch.tensor([tokens])).logits[0, -1].argmax())
    assert sampled == [expected, expected]


def test_a_plan_without_rows_or_samples_is_executed(step: Callable[[StepPlan], list[int]]) -> None:
    assert step(StepPlan(0, b"", [], b"", pack([]), None)) == []
    admit = Admit(0, pack([1, 2, 3]), 3, 0, pack([0]), Sampling())
    assert step(StepPlan(1, b"", [admit], b"", pack([0]), pack([2]))) == []


def test_the_layout_puts_single_tokens_first(runner: ModelRunner) -> None:
    slots = Slots(4, 64, 4, 64)
    admitted = [
        Admit(0, pack(range(10, 16)), 6, 1, pack([5, 6]), Sampling()),
        Admit(1, pack(range(20, 25)), 5, 4, pack([7, 8]), Sampling()),
        Admit(2, pack(range(30, 33)), 3, 0, pack([9]), Sampling()),
    ]
    batch = slots.apply(StepPlan(0, b"", admitted, b"", pack([0, 1, 2]), pack([4, 1, 3])))
    inputs = runner.prepare(slots, batch)
    meta = inputs.metadata
    assert inputs.input_ids.tolist() == [24, 11, 12, 13, 14, 30, 31, 32]
    assert inputs.positions.tolist() == [4, 1, 2, 3, 4, 0, 1, 2]
    assert meta.slot_mapping.tolist() == [32, 21, 22, 23, 24, 36, 37, 38]
    assert meta.query_start.tolist() == [0, 1, 5, 8]
    assert meta.seq_lens.tolist() == list(meta.seq_lens_host) == [5, 5, 3]
    assert list(meta.query_lens_host) == [1, 4, 3]
    assert (meta.num_decodes, meta.max_seq_len) == (1, 5)
    assert meta.block_tables[:, 0].tolist() == [7, 5, 9]
    # Slot 0 still has a token to go; slots 1 and 2 sample, in the plan's order.
    assert inputs.last_tokens is not None
    assert inputs.last_tokens.tolist() == [0, 7]


def test_the_shortest_models_are_warmed_up_too(config: EngineConfig) -> None:
    threads = torch.get_num_threads()
    for length in (2, 3, 8):
        runner = ModelRunner(msgspec.structs.replace(config, max_model_len=length), 0, "")
        runner.load(lambda phase: logging.info(phase))
        runner.allocate(8, length)
        runner.warm_up()
    torch.set_num_threads(threads)
