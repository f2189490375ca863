"""A worker process: start up in phases, then run one plan after another until the core hangs up.

Knows the pipe's protocol and the slot table; what computes the tokens is behind `Backend`, imported only
when it is chosen: the oracle starts without torch.
"""

from __future__ import annotations

import gc
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Protocol

import msgspec

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo, HeadraceError
from ..ipc.messages import (
    Allocate,
    Fatal,
    FromWorker,
    Loaded,
    Progress,
    StepPlan,
    StepResult,
    ToWorker,
    WorkerReady,
    WorkerStart,
)
from ..ipc.pipe import Pipe, PipeClosedError
from .kv_cache import CacheSize
from .slots import I32, Batch, Slots


class Backend(Protocol):
    """What turns batches into tokens. `load`, `allocate`, `warm_up`, then `execute` for every plan."""

    def load(self, progress: Callable[[str], None]) -> CacheSize:
        """Get ready to say how large the KV cache may be; names its phases to `progress`."""

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Make the KV cache. No position will reach `max_model_len`."""

    def warm_up(self) -> None:
        """Do what the first step would otherwise wait for."""

    def execute(self, slots: Slots, batch: Batch) -> I32:
        """Compute the batch; returns the token of each row in `batch.sampling`. Leaves `slots` unchanged."""


def run(payload: bytes) -> None:
    """The process's entry; `payload` is a `WorkerStart`. Exits 0 when the core hangs up, 1 on an error."""
    start = msgspec.json.decode(payload, type=WorkerStart)
    pipe: Pipe[FromWorker, ToWorker] = Pipe(socket.socket(fileno=start.fd), ToWorker)
    worker = Worker(start, pipe)
    try:
        worker.run()
    except PipeClosedError:
        return
    except Exception as error:
        sys.exit(worker.report(error))


class Worker:
    """One rank. `phase` is what it is doing, for error messages."""

    def __init__(self, start: WorkerStart, pipe: Pipe[FromWorker, ToWorker]) -> None:
        self.phase = "start"
        self._start = start
        self._pipe = pipe

    def run(self) -> None:
        """Start up and serve. Ends by raising; PipeClosedError is the good end."""
        config, rank = self._start.config, self._start.rank
        backend = self._make_backend()
        size = backend.load(self._progress)
        self._pipe.send(Loaded(rank, size.num_blocks, size.block_bytes, size.arithmetic))
        message = self._pipe.recv()
        assert isinstance(message, Allocate), f"expected Allocate, got {message}"
        self._progress("allocate KV cache")
        slots = Slots(config.max_num_seqs, message.max_model_len, config.block_size, message.num_blocks)
        backend.allocate(message.num_blocks, message.max_model_len)
        self._progress("warm up")
        backend.warm_up()
        # What exists now stays: later collections need not walk through torch's hundred thousand objects.
        gc.collect()
        gc.freeze()
        self._pipe.send(WorkerReady(rank))
        self._serve(backend, slots)

    def report(self, error: Exception) -> int:
        """Tell the core why this worker ends; returns the exit code."""
        try:
            self._pipe.send(Fatal(self._start.rank, self.phase, ErrorInfo.of(error)))
        except PipeClosedError:
            return 0  # the core ended first; a peer's death in mid-collective is a consequence of that
        if not isinstance(error, HeadraceError):
            traceback.print_exception(error)
        return 1

    def _make_backend(self) -> Backend:
        config: EngineConfig = self._start.config
        if config.load_format == "oracle":
            self._progress("start oracle")
            from .oracle import OracleBackend  # noqa: PLC0415 (only when it is the one)

            return OracleBackend(config)
        self._progress("import torch")
        from .runner import ModelRunner  # noqa: PLC0415 (two seconds of imports, after the first message)

        return ModelRunner(config, self._start.rank, self._start.rendezvous)

    def _progress(self, phase: str) -> None:
        self.phase = phase
        self._pipe.send(Progress(self._start.rank, phase))

    def _serve(self, backend: Backend, slots: Slots) -> None:
        pipe, answers = self._pipe, self._start.rank == 0
        while True:
            self.phase = "waiting for a plan"
            plan = pipe.recv()
            assert isinstance(plan, StepPlan), f"expected StepPlan, got {plan}"
            self.phase = f"step {plan.step}"
            batch = slots.apply(plan)
            tokens = backend.execute(slots, batch)
            slots.commit(batch, tokens)
            if answers:
                pipe.send(StepResult(plan.step, tokens.tobytes()))
