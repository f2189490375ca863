"""A worker process: start up in phases, then run one plan after another until the core hangs up.

Knows the pipe's protocol; what computes the tokens is behind `Runner`, imported only when it is chosen: the
oracle starts without torch.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

import msgspec

from ..ipc.config import EngineConfig
from ..ipc.errors import EngineDeadError, ErrorInfo, HeadraceError
from ..ipc.messages import (
    Allocate,
    Command,
    Compiling,
    Fatal,
    FromWorker,
    Loaded,
    Prepared,
    Progress,
    StepPlan,
    StepResult,
    ToWorker,
    UsePrepared,
    WorkerReady,
)
from ..ipc.odometer import odometer
from ..ipc.payloads import WorkerStart
from ..ipc.pipe import Pipe, PipeClosedError
from ..ipc.process import die_with_parent
from .commands import Commands, Sleeper
from .host_memory import bound_kernel_caches
from .in_order import InOrder
from .kv_cache import CacheSize

_MAX_FRAME_BYTES = 1 << 30
"""A plan names each token and block of what it admits: some megabytes."""
_QUIET = 0.1
"""Seconds without a step before something is prepared: a request that follows the start, or another one, does
not wait."""


class Pending(Protocol):
    """A step under way."""

    def ready(self) -> bool:
        """The tokens are there; never blocks."""

    def result(self) -> StepResult:
        """What the plan is answered with; blocks until it is there."""


class Runner(Sleeper, Protocol):
    """What turns plans into tokens. `load`, `allocate`, `warm_up`, then `submit` for every plan."""

    def load(self, progress: Callable[[str], None]) -> CacheSize:
        """Get ready to say how large the KV cache may be; names its phases to `progress`."""

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Make the KV cache and the slot table. No position will reach `max_model_len`."""

    def warm_up(self) -> None:
        """Do what the first step would otherwise wait for."""

    def submit(self, plan: StepPlan) -> Pending:
        """Start a step. Steps run in order; the next may be submitted before this one's tokens are there."""

    def idle(self) -> bool:
        """Called while there is nothing to run: prepare a little; False when nothing is left to prepare."""

    def use_prepared(self, count: int) -> None:
        """Steps may from now on be run as the first `count` calls of `idle` have prepared it."""


def run(payload: bytes) -> NoReturn:
    """The process's entry; `payload` is a `WorkerStart`. Exits 0 when the core hangs up, 1 on an error."""
    die_with_parent()
    start = msgspec.json.decode(payload, type=WorkerStart)
    pipe: Pipe[FromWorker, ToWorker] = Pipe(socket.socket(fileno=start.fd), ToWorker, _MAX_FRAME_BYTES)
    worker, code = Worker(start, pipe), 0
    try:
        worker.run()
    except PipeClosedError:
        pass
    except msgspec.DecodeError as error:
        code = worker.report(EngineDeadError(f"the core sent what cannot be read: {error}"))
    except Exception as error:
        code = worker.report(error)
    # At the interpreter's end NCCL's threads would outlive the GPU's driver, and crash.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
    os._exit(code)


class Worker:
    """One rank. `phase` is what it is doing, for error messages."""

    def __init__(self, start: WorkerStart, pipe: Pipe[FromWorker, ToWorker]) -> None:
        self.phase = "start"
        self._kernel = ""
        """What is being compiled, if anything."""
        self._start = start
        self._pipe = pipe
        self._advance = odometer(start.odometers, start.rank)

    def run(self) -> None:
        """Start up and serve. Ends by raising; PipeClosedError is the good end."""
        rank = self._start.rank
        runner = self._make_runner()
        size = runner.load(self._progress)
        self._pipe.send(Loaded(rank, size.num_blocks, size.block_bytes, size.arithmetic))
        message = self._pipe.recv()
        assert isinstance(message, Allocate), f"expected Allocate, got {message}"
        self._progress("allocate KV cache")
        runner.allocate(message.num_blocks, message.max_model_len)
        self._progress("warm up")
        runner.warm_up()
        # What exists now stays: later collections need not walk through torch's hundred thousand objects.
        gc.collect()
        gc.freeze()
        self._pipe.send(WorkerReady(rank))
        self._serve(runner)

    def report(self, error: Exception) -> int:
        """Tell the core why this worker ends; returns the exit code."""
        phase = f"{self.phase}, compiling {self._kernel}" if self._kernel else self.phase
        try:
            self._pipe.send(Fatal(self._start.rank, phase, ErrorInfo.of(error), time.monotonic()))
        except PipeClosedError:
            return 0  # the core ended first; a peer's death in mid-collective is a consequence of that
        if not isinstance(error, HeadraceError):
            traceback.print_exception(error)
        return 1

    def _make_runner(self) -> Runner:
        config: EngineConfig = self._start.config
        if config.load_format == "oracle":
            self._progress("start oracle")
            from .oracle import OracleBackend  # noqa: PLC0415 (only when it is the one)

            return InOrder(config, OracleBackend(config))
        self._progress("import torch")
        if config.device == "cuda":
            from .compiling import Compiler  # noqa: PLC0415 (two seconds of imports, after that)
            from .cuda_runner import CudaRunner  # noqa: PLC0415 (as above)

            compiler = Compiler(self._compile)
            return CudaRunner(config, self._start.rank, self._start.rendezvous, compiler)
        # OpenMP's threads spin for milliseconds while they wait, on the cores that everybody else needs:
        # steps are 10 times slower beside another busy process. This many bridge two operators.
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
        bound_kernel_caches()
        from .runner import ModelRunner  # noqa: PLC0415 (as above)

        runner = ModelRunner(config, self._start.rank, self._start.rendezvous, self._advance)
        return InOrder(config, runner)

    def _prepared(self, runner: Runner, count: int) -> None:
        if self._start.config.tensor_parallel_size == 1:
            runner.use_prepared(count)
        else:
            self._pipe.send(Prepared(self._start.rank, count))

    def _progress(self, phase: str) -> None:
        self.phase = phase
        self._pipe.send(Progress(self._start.rank, phase))

    def _compile(self, kernel: str) -> None:
        self._kernel = kernel
        self._pipe.send(Compiling(self._start.rank, kernel))

    def _serve(self, runner: Runner) -> None:
        """Take plans and answer them in order, polling both sides while a step is under way."""
        pipe, answers = self._pipe, self._start.rank == 0
        under_way: deque[tuple[int, Pending]] = deque()
        commands = Commands(self._start.config, self._start.rank, runner)
        num_prepared, prepared, quiet = 0, False, False
        while True:
            self.phase = "waiting for a plan"
            message = pipe.recv(0 if under_way else None if prepared else 0 if quiet else _QUIET)
            if isinstance(message, StepPlan):
                quiet = False
                self.phase = f"step {message.step}"
                under_way.append((message.step, runner.submit(message)))
                self._advance()
            elif isinstance(message, UsePrepared):
                if not commands.is_asleep:  # what was prepared is gone
                    runner.use_prepared(message.count)
            elif isinstance(message, Command):
                self.phase = message.name
                was_asleep, result = commands.is_asleep, commands.run(message)
                if commands.is_asleep != was_asleep:  # what was prepared is gone; it can be again
                    num_prepared, prepared = 0, commands.is_asleep
                    pipe.send(Prepared(self._start.rank, 0))
                pipe.send(result)
            elif message is not None:
                raise AssertionError(f"expected StepPlan, got {message}")
            elif not under_way:
                quiet = True
                prepared = not runner.idle()
                if not prepared:
                    num_prepared += 1
                    self._prepared(runner, num_prepared)
            while under_way and under_way[0][1].ready():
                step, pending = under_way.popleft()
                self.phase = f"step {step}"
                if answers:
                    pipe.send(pending.result())
