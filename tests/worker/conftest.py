"""Worker processes on real pipes, configurations for them, and random traffic."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import (
    Admit,
    Allocate,
    FromWorker,
    Loaded,
    Progress,
    Sampling,
    StepPlan,
    StepResult,
    ToWorker,
    WorkerReady,
    pack,
    unpack,
)
from headrace.ipc.odometer import Odometers
from headrace.ipc.payloads import WorkerStart
from headrace.ipc.pipe import Pipe, socket_pair
from headrace.ipc.process import Child, spawn

MakeConfig: TypeAlias = Callable[..., EngineConfig]
VOCAB, BLOCK = 1000, 4

ORACLE: dict[str, Any] = {
    "model_path": "/nowhere",
    "architecture": "LlamaForCausalLM",
    "vocab_size": VOCAB,
    "eos_token_ids": [2],
    "enforce_eager": False,
    "max_model_len": 256,
    "max_model_len_is_explicit": False,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "block_size": BLOCK,
    "num_gpu_blocks_override": 256,
}
"""What differs from the configuration of the other tests."""


@pytest.fixture(scope="session")
def make_config(make_config: MakeConfig) -> MakeConfig:
    """An oracle's configuration, with any field changed."""
    return lambda **changes: make_config(**{**ORACLE, **changes})


class Worker:
    """The core's end of one worker."""

    def __init__(self, config: EngineConfig, rank: int, rendezvous: Path) -> None:
        ours, theirs = socket_pair()
        self.sock = ours
        odometers = Odometers(config.tensor_parallel_size)
        descriptors = [theirs.fileno(), odometers.fd]
        start = WorkerStart(config, rank, theirs.fileno(), str(rendezvous), odometers.fd)
        self.child: Child = spawn("worker", "headrace.worker.main:run", start, pass_fds=descriptors)
        theirs.close()
        odometers.close()
        self.pipe: Pipe[ToWorker, FromWorker] = Pipe(ours, FromWorker)

    def recv(self) -> FromWorker:
        message = self.pipe.recv(30)
        assert message is not None
        return message

    def skip_progress(self) -> FromWorker:
        while isinstance(message := self.recv(), Progress):
            pass
        return message

    def start(self, peers: Sequence[Worker] = (), max_model_len: int = 256) -> Loaded:
        """Bring this worker, and its peers, to where plans are taken."""
        workers = [self, *peers]
        answers = [worker.skip_progress() for worker in workers]
        loaded = answers[0]
        assert isinstance(loaded, Loaded), loaded
        for worker in workers:
            worker.pipe.send(Allocate(loaded.num_blocks, max_model_len))
        ready = [worker.skip_progress() for worker in workers]
        assert all(isinstance(answer, WorkerReady) for answer in ready), ready
        return loaded

    def step(self, plan: StepPlan) -> list[int]:
        self.pipe.send(plan)
        result = self.recv()
        assert isinstance(result, StepResult), result
        assert result.step == plan.step
        return list(unpack(result.tokens))

    def ended(self) -> str:
        deadline = time.monotonic() + 10
        while self.child.alive:
            assert time.monotonic() < deadline, "the worker does not end"
            time.sleep(0.01)
        return self.child.cause_of_death()


StartWorker: TypeAlias = Callable[..., Worker]


@pytest.fixture
def start_worker(make_config: MakeConfig, tmp_path: Path) -> Iterator[StartWorker]:
    workers: list[Worker] = []

    def start(rank: int = 0, **changes: object) -> Worker:
        workers.append(Worker(make_config(**changes), rank, tmp_path / "ranks"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.sock.close()
        worker.child.stop(0)


class Request:
    """What a test knows of one running request."""

    def __init__(self, slot: int, prompt: list[int], seed: int, temperature: float = 1.0) -> None:
        self.slot = slot
        self.prompt = prompt
        self.seed = seed
        self.temperature = temperature
        self.output: list[int] = []
        self.num_computed = 0
        self.blocks: list[int] = []

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    def admit(self) -> Admit:
        sampling = Sampling(self.temperature, seed=self.seed)
        tokens, blocks = pack(self.tokens), pack(self.blocks)
        return Admit(self.slot, tokens, len(self.prompt), self.num_computed, blocks, sampling)


class Traffic:
    """Random plans: chunks of any size in any order, preemption, released and reused slots."""

    def __init__(self, rng: random.Random, num_slots: int, num_blocks: int, temperature: float) -> None:
        self.rng = rng
        self.temperature = temperature
        self.free_slots = list(range(num_slots))
        self.free_blocks = list(range(num_blocks))
        self.running: list[Request] = []
        self.preempted: list[Request] = []
        self.released: list[int] = []
        self.finished: list[Request] = []

    def plan(self, number: int) -> tuple[StepPlan, list[Request]]:
        """The next plan and the requests that sample in it."""
        self._leave()
        admitted = self._enter()
        released, self.released = self.released, []
        rows = self.rng.sample(self.running, self.rng.randint(1, len(self.running)))
        rows += [request for request in admitted if request not in rows]
        counts = [self.rng.choice([1, 1, len(r.tokens), 3]) for r in rows]
        counts = [min(n, len(r.tokens) - r.num_computed) for n, r in zip(counts, rows, strict=True)]
        granted: list[int] = []
        admits: dict[int, Admit] = {}
        for request, count in zip(rows, counts, strict=True):
            for block in self._needed(request, count):
                request.blocks.append(block)
                if request not in admitted:
                    granted += [request.slot, block]
            if request in admitted:
                admits[request.slot] = request.admit()
            request.num_computed += count
        plan = StepPlan(
            number,
            pack(released),
            list(admits.values()),
            pack(granted),
            pack([r.slot for r in rows]),
            pack(counts),
        )
        return plan, [request for request in rows if request.num_computed == len(request.tokens)]

    def run(self, num_steps: int, step: Callable[[StepPlan], list[int]]) -> list[Request]:
        """Have plans executed; returns all requests that ever ran."""
        for number in range(num_steps):
            plan, sampling = self.plan(number)
            for request, token in zip(sampling, step(plan), strict=True):
                request.output.append(token)
        return self.running + self.preempted + self.finished

    def _needed(self, request: Request, count: int) -> list[int]:
        missing = -(-(request.num_computed + count) // BLOCK) - len(request.blocks)
        return [self.free_blocks.pop(self.rng.randrange(len(self.free_blocks))) for _ in range(missing)]

    def _leave(self) -> None:
        for request in [r for r in self.running if self.rng.random() < 0.05]:
            self.running.remove(request)
            self.released.append(request.slot)
            self.free_slots.append(request.slot)
            self.free_blocks += request.blocks
            request.blocks, request.num_computed = [], 0
            (self.preempted if len(request.output) < 20 else self.finished).append(request)

    def _enter(self) -> list[Request]:
        entered: list[Request] = []
        while self.free_slots and (not self.running or self.rng.random() < 0.5):
            slot = self.free_slots.pop(0)
            if self.preempted:
                request = self.preempted.pop()
                request.slot = slot
            else:
                prompt = [self.rng.randrange(VOCAB) for _ in range(self.rng.randint(1, 30))]
                request = Request(slot, prompt, self.rng.randrange(2**63), self.temperature)
            self.running.append(request)
            entered.append(request)
        return entered


@pytest.fixture
def traffic() -> Traffic:
    """Greedy traffic for 8 slots and 256 blocks."""
    return Traffic(random.Random(0), num_slots=8, num_blocks=256, temperature=0.0)


@pytest.fixture
def new_request() -> Callable[..., Request]:
    return Request
