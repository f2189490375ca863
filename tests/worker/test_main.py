"""A real worker process, driven over its pipe as the core drives it (oracle backend)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import (
    Admit,
    Allocate,
    Fatal,
    FromWorker,
    Loaded,
    Progress,
    Sampling,
    StepPlan,
    StepResult,
    ToWorker,
    WorkerReady,
    WorkerStart,
    pack,
    unpack,
)
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.pipe import Pipe, PipeClosedError, socket_pair
from headrace.ipc.process import Child, spawn

VOCAB, BLOCK = 1000, 4
MakeConfig: TypeAlias = Callable[..., EngineConfig]


class Worker:
    """The core's end of one worker."""

    def __init__(self, config: EngineConfig, rank: int, rendezvous: Path) -> None:
        ours, theirs = socket_pair()
        self.sock = ours
        start = WorkerStart(config, rank, theirs.fileno(), str(rendezvous))
        self.child: Child = spawn("worker", "headrace.worker.main:run", start, pass_fds=[theirs.fileno()])
        theirs.close()
        self.pipe: Pipe[ToWorker, FromWorker] = Pipe(ours, FromWorker)

    def recv(self) -> FromWorker:
        message = self.pipe.recv(30)
        assert message is not None
        return message

    def skip_progress(self) -> FromWorker:
        while isinstance(message := self.recv(), Progress):
            pass
        return message

    def start(self, max_model_len: int = 256) -> Loaded:
        loaded = self.skip_progress()
        assert isinstance(loaded, Loaded), loaded
        self.pipe.send(Allocate(loaded.num_blocks, max_model_len))
        assert isinstance(self.skip_progress(), WorkerReady)
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

    def __init__(self, slot: int, prompt: list[int], seed: int) -> None:
        self.slot = slot
        self.prompt = prompt
        self.seed = seed
        self.output: list[int] = []
        self.num_computed = 0
        self.blocks: list[int] = []

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    def admit(self) -> Admit:
        sampling = Sampling(seed=self.seed)
        tokens, blocks = pack(self.tokens), pack(self.blocks)
        return Admit(self.slot, tokens, len(self.prompt), self.num_computed, blocks, sampling)

    def expected(self) -> list[int]:
        return oracle_stream(self.prompt, self.seed, len(self.output), VOCAB)


class Traffic:
    """Random plans: chunks of any size in any order, preemption, released and reused slots."""

    def __init__(self, rng: random.Random, num_slots: int, num_blocks: int) -> None:
        self.rng = rng
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
                request = Request(slot, prompt, self.rng.randrange(2**63))
            self.running.append(request)
            entered.append(request)
        return entered


def test_random_plans_give_the_oracles_streams(start_worker: StartWorker) -> None:
    worker = start_worker()
    worker.start()
    traffic = Traffic(random.Random(0), num_slots=8, num_blocks=256)
    for number in range(600):
        plan, sampling = traffic.plan(number)
        for request, token in zip(sampling, worker.step(plan), strict=True):
            request.output.append(token)
    requests = traffic.running + traffic.preempted + traffic.finished
    assert len(requests) > 20
    assert sum(len(request.output) for request in requests) > 600
    assert all(request.output == request.expected() for request in requests)


def test_steps_follow_one_another_without_their_tokens(start_worker: StartWorker) -> None:
    """The core sends plans before it knows the tokens of earlier ones; a rank that is not 0 never answers."""
    request = Request(3, [7, 8, 9], seed=5)
    request.blocks = [9, 8]
    plans = [StepPlan(0, b"", [request.admit()], b"", pack([3]), pack([3]))]
    plans += [
        StepPlan(step, b"", [], pack([3, 20 + step] if step % 4 == 0 else []), None, None)
        for step in range(1, 20)
    ]
    results: list[int] = []
    workers = [start_worker(rank, tensor_parallel_size=2) for rank in range(2)]
    for worker in workers:
        worker.start()
        for plan in plans:
            worker.pipe.send(plan)
    for plan in plans:
        result = workers[0].recv()
        assert isinstance(result, StepResult)
        assert result.step == plan.step
        results += unpack(result.tokens)
    assert results == oracle_stream(request.prompt, 5, 20, VOCAB)
    workers[1].pipe.send(
        StepPlan(20, b"", [], b"", pack([0]), None)
    )  # a free slot: the answer proves the rest ran
    fatal = workers[1].recv()
    assert isinstance(fatal, Fatal)
    assert fatal.rank == 1


def test_a_prefix_hit_reads_what_another_row_writes(start_worker: StartWorker) -> None:
    worker = start_worker()
    worker.start()
    first, second = Request(0, [1, 2, 3, 4, 5], 1), Request(1, [1, 2, 3, 4, 6], 2)
    first.blocks, second.blocks, second.num_computed = [7, 3], [7, 5], 4
    plan = StepPlan(0, b"", [first.admit(), second.admit()], b"", pack([0, 1]), pack([5, 1]))
    tokens = worker.step(plan)
    assert tokens == [oracle_stream(r.prompt, r.seed, 1, VOCAB)[0] for r in (first, second)]


def test_a_wrong_block_changes_the_stream(start_worker: StartWorker) -> None:
    """The oracle really reads its states through the block table."""
    worker = start_worker()
    worker.start()
    request = Request(0, [1, 2, 3, 4, 5], 1)
    request.blocks, request.num_computed = [7, 3], 4  # nobody has computed block 7
    tokens = worker.step(StepPlan(0, b"", [request.admit()], b"", pack([0]), pack([1])))
    assert tokens != oracle_stream(request.prompt, 1, 1, VOCAB)


def test_the_first_message_is_progress_and_hanging_up_ends_it_quietly(
    start_worker: StartWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = start_worker()
    assert isinstance(worker.recv(), Progress)
    worker.start()
    worker.sock.close()
    assert worker.ended().endswith("exited with code 0")
    assert capfd.readouterr() == ("", "")


def test_hanging_up_during_the_start_ends_it_quietly(
    start_worker: StartWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = start_worker()
    worker.sock.close()
    assert worker.ended().endswith("exited with code 0")
    assert capfd.readouterr() == ("", "")


def test_no_room_for_a_block_is_the_callers_error(
    start_worker: StartWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = start_worker(num_gpu_blocks_override=None, kv_cache_memory_bytes=3)
    fatal = worker.skip_progress()
    assert isinstance(fatal, Fatal)
    assert (fatal.error.kind, fatal.error.parameter, fatal.error.value) == (
        "config",
        "kv_cache_memory_bytes",
        "3",
    )
    assert worker.ended().endswith("exited with code 1")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (StepPlan(4, b"", [], b"", pack([1]), None), "free slot"),
        (StepPlan(4, b"", [], b"abc", None, None), "buffer size"),
        (Allocate(1, 2), "expected StepPlan"),
    ],
)
def test_a_plan_that_makes_no_sense_is_fatal(
    start_worker: StartWorker, capfd: pytest.CaptureFixture[str], message: ToWorker, says: str
) -> None:
    worker = start_worker()
    worker.start()
    worker.pipe.send(message)
    fatal = worker.recv()
    assert isinstance(fatal, Fatal)
    assert fatal.error.kind == "dead"
    assert says in fatal.error.message
    assert worker.ended().endswith("exited with code 1")
    assert "Traceback" in capfd.readouterr().err
    with pytest.raises(PipeClosedError):
        worker.pipe.recv(5)


def test_garbage_on_the_pipe_is_fatal(start_worker: StartWorker, capfd: pytest.CaptureFixture[str]) -> None:
    worker = start_worker()
    worker.start()
    worker.pipe.send_frame(b"\x03\x00\x00\x00abc")
    fatal = worker.recv()
    assert isinstance(fatal, Fatal)
    assert fatal.phase == "waiting for a plan"
    assert worker.ended().endswith("exited with code 1")
    assert "Traceback" in capfd.readouterr().err
