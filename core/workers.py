"""The worker processes: started, brought up together, sent plans, and watched for their death.

One pipe per rank over an inherited socket; every rank gets every plan, rank 0 answers. Knows nothing of what
plans mean.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo, HeadraceError
from ..ipc.messages import (
    Allocate,
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
    WorkerStart,
)
from ..ipc.pipe import Pipe, PipeClosedError, frame, poll_pipes, socket_pair
from ..ipc.process import Child, spawn

ENTRY = "headrace.worker.main:run"
SERVING = "serving"
_GRACE = 0.2
"""Seconds that a worker gets to end by itself: it has nothing to save."""

M = TypeVar("M")


class WorkerError(HeadraceError):
    """A worker failed or died; `fatal` names the rank, the phase and the cause.

    `silent` when it died without a `Fatal` of its own.
    """

    def __init__(self, fatal: Fatal, *, silent: bool = False) -> None:
        super().__init__(f"worker {fatal.rank}, in phase {fatal.phase!r}: {fatal.error.message}")
        self.fatal = fatal
        self.silent = silent


class _Worker:
    """One rank: its process, its pipe, and the phase it last named."""

    def __init__(self, child: Child, pipe: Pipe[ToWorker, FromWorker]) -> None:
        self.child = child
        self.pipe = pipe
        self.phase = "start"


class Workers:
    """All ranks. Every method may raise WorkerError; `close` never does."""

    def __init__(self, config: EngineConfig) -> None:
        # One rank has nobody to find.
        many = config.tensor_parallel_size > 1
        self._folder = tempfile.mkdtemp(prefix="headrace-workers-") if many else None
        self._encoder = msgspec.msgpack.Encoder()
        self._workers: list[_Worker] = []
        self._prepared = [0] * config.tensor_parallel_size
        try:
            for rank in range(config.tensor_parallel_size):
                self._workers.append(self._start(config, rank))
        except BaseException:
            self.close()
            raise
        self._pipes = [worker.pipe for worker in self._workers]

    def bring_up(
        self, size_cache: Callable[[list[Loaded]], Allocate], progress: Callable[[Progress], None]
    ) -> Allocate:
        """Load, size and allocate on all ranks; returns when all take plans. `size_cache` may raise."""
        allocate = size_cache(self._gather(Loaded, progress))
        self._broadcast(allocate)
        self._gather(WorkerReady, progress)
        for worker in self._workers:
            worker.phase = SERVING
        return allocate

    def descriptors(self) -> list[int]:
        """To poll for reading: a result, or a death."""
        return [pipe.fileno() for pipe in self._pipes]

    def send(self, plan: StepPlan) -> None:
        """Give every rank a plan."""
        self._broadcast(plan)

    def recv(self) -> StepResult | None:
        """The next result if it is there. Also looks at the other ranks, which may have died."""
        for rank in poll_pipes(self._pipes, 0):
            message = self._hear(rank)
            if isinstance(message, StepResult):
                return message
            if message is not None:
                raise self._failure(rank, f"sent {type(message).__name__} while serving")
        return None

    def close(self) -> None:
        """End all workers, by force if they are in the middle of something. Idempotent."""
        for worker in self._workers:
            worker.pipe.close()  # the end of the pipe is the request to end
        for worker in self._workers:
            worker.child.stop(_GRACE)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, config: EngineConfig, rank: int) -> _Worker:
        ours, theirs = socket_pair()
        with theirs:
            rendezvous = "" if self._folder is None else str(Path(self._folder, "rendezvous"))
            start = WorkerStart(config, rank, theirs.fileno(), rendezvous)
            name = f"worker {rank}"
            child = spawn(name, ENTRY, start, pass_fds=(theirs.fileno(),), remove=self._folder)
        return _Worker(child, Pipe(ours, FromWorker))

    def _gather(self, kind: type[M], progress: Callable[[Progress], None]) -> list[M]:
        """One message of this kind from every rank, in rank order."""
        got: dict[int, M] = {}
        while len(got) < len(self._workers):
            for rank in poll_pipes(self._pipes, None):
                message = self._hear(rank)
                if isinstance(message, Progress):
                    self._workers[rank].phase = message.phase
                    progress(message)
                elif isinstance(message, kind) and rank not in got:
                    got[rank] = message
                elif message is not None:
                    raise self._failure(rank, f"sent {type(message).__name__} before {kind.__name__}")
        return [got[rank] for rank in range(len(self._workers))]

    def _broadcast(self, message: ToWorker) -> None:
        data = frame(self._encoder.encode(message))
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_frame(data)
            except PipeClosedError:
                raise self._last_words(rank) from None

    def _hear(self, rank: int) -> Any:
        """A rank's next message if it is there; when it has failed, raises the first cause."""
        try:
            while isinstance(message := self._recv(rank), Prepared):
                self._note_prepared(rank, message.count)
            return message
        except WorkerError as error:
            raise self._first_cause(error) from None

    def _note_prepared(self, rank: int, count: int) -> None:
        before = min(self._prepared)
        self._prepared[rank] = count
        if min(self._prepared) > before:
            self._broadcast(UsePrepared(min(self._prepared)))

    def _recv(self, rank: int) -> Any:
        try:
            message = self._pipes[rank].recv(0)
        except PipeClosedError:
            raise self._death(rank) from None
        except msgspec.DecodeError as error:
            raise self._failure(rank, f"sent what cannot be decoded: {error}") from None
        if isinstance(message, Fatal):
            raise WorkerError(message)
        return message

    def _last_words(self, rank: int) -> WorkerError:
        """Why a rank no longer takes messages: it may have said so."""
        try:
            while self._hear(rank) is not None:
                pass
        except WorkerError as error:
            return error
        return self._failure(rank, "closed its pipe")

    def _first_cause(self, error: WorkerError) -> WorkerError:
        """Of `error` and whatever else has failed by now, the one that the others follow from.

        A rank that dies makes its peers fail in their collective operations, and these may be heard first.
        A rank that went without a word did not fail because of a peer.
        """
        found = [error]
        for rank in range(len(self._pipes)):
            try:
                while rank != error.fatal.rank and self._recv(rank) is not None:
                    pass
            except WorkerError as other:
                found.append(other)
        return next((each for each in found if each.silent), error)

    def _death(self, rank: int) -> WorkerError:
        try:
            cause = self._workers[rank].child.cause_of_death()
        except subprocess.TimeoutExpired:
            cause = "closed its pipe"
        return self._failure(rank, cause, silent=True)

    def _failure(self, rank: int, cause: str, *, silent: bool = False) -> WorkerError:
        phase = self._workers[rank].phase
        return WorkerError(Fatal(rank, phase, ErrorInfo("dead", cause)), silent=silent)
