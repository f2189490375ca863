"""One life of the worker processes: from their start, through serving, to the first death among them.

One pipe per rank over an inherited socket; every rank gets every plan, rank 0 answers. Nothing here waits, so
that the core serves its clients whatever its workers do. Knows nothing of what plans mean.
"""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo, HeadraceError
from ..ipc.inspection import STOPPED, activity
from ..ipc.logs import fields
from ..ipc.messages import (
    Allocate,
    Command,
    CommandResult,
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
from ..ipc.odometer import Odometers
from ..ipc.payloads import WorkerStart
from ..ipc.pipe import Pipe, PipeClosedError, frame, poll_pipes, socket_pair
from ..ipc.process import Child, spawn
from .watch import Compilation, Sight

LOGGER = logging.getLogger(__name__)

ENTRY = "headrace.worker.main:run"
SERVING = "serving"
_MAX_FRAME_BYTES = 64 << 20
"""A worker that says more at once is not to be believed."""
_NOTEWORTHY_SECONDS = 1.0
"""A kernel that takes longer to compile is logged: a request may have waited for it."""

SizeCache: TypeAlias = Callable[[Sequence[Loaded]], Allocate]


class WorkerError(HeadraceError):
    """A worker failed or died; `fatal` names the rank, the phase and the cause.

    `silent` when it died without a `Fatal` of its own.
    """

    def __init__(self, fatal: Fatal, *, silent: bool = False) -> None:
        who = "the workers" if fatal.rank is None else f"worker {fatal.rank}"
        super().__init__(f"{who}, in phase {fatal.phase!r}: {fatal.error.message}")
        self.fatal = fatal
        self.silent = silent


class _Worker:
    """One rank: its process, its pipe, and the phase it last named."""

    def __init__(self, child: Child, pipe: Pipe[ToWorker, FromWorker]) -> None:
        self.child = child
        self.pipe = pipe
        self.phase = "start"
        self.num_phases = 0


class Ranks:
    """All ranks, just started. `advance` until they serve, then `send` and `recv`; these raise WorkerError.

    `hang_up`, `kill` and `is_gone` end them step by step; `close` does it at once.
    """

    def __init__(
        self, config: EngineConfig, size_cache: SizeCache, progress: Callable[[Progress], None]
    ) -> None:
        """`size_cache` is asked once all ranks are loaded; what it raises passes through `advance`."""
        # In memory: whoever is killed, nothing of it is left. One rank has nobody to find.
        self._meeting = os.memfd_create("rendezvous") if config.tensor_parallel_size > 1 else -1
        self._odometers = Odometers(config.tensor_parallel_size)
        self._size_cache = size_cache
        self._progress = progress
        self._encoder = msgspec.msgpack.Encoder()
        self._loaded: dict[int, Loaded] = {}
        self._ready: set[int] = set()
        self._workers: list[_Worker] = []
        self._prepared = [0] * config.tensor_parallel_size
        self._compilations: dict[int, Compilation] = {}
        """The latest of each rank."""
        try:
            for rank in range(config.tensor_parallel_size):
                self._workers.append(self._start(config, rank))
        except BaseException:
            self.close()
            raise
        self._pipes = [worker.pipe for worker in self._workers]

    def advance(self) -> bool:
        """Take in what the ranks say while they start; True once all of them take plans."""
        while speaking := poll_pipes(self._pipes, 0):
            for rank in speaking:
                message = self._hear(rank)
                if message is not None:
                    self._take_start_up(rank, message)
        return len(self._ready) == len(self._workers)

    def send(self, message: StepPlan | Command) -> None:
        """Give every rank a plan or a command. What does not fit into a pipe is left to `flush`."""
        self._broadcast(message)

    def flush(self) -> bool:
        """Send on what did not fit; True when nothing is left."""
        done = True
        for rank, pipe in enumerate(self._pipes):
            try:
                done &= pipe.flush()
            except PipeClosedError:
                raise self._last_words(rank) from None
        return done

    def recv(self) -> StepResult | CommandResult | None:
        """The next result if it is there. Also looks at the other ranks, which may have died."""
        for rank in poll_pipes(self._pipes, 0):
            message = self._hear(rank)
            if isinstance(message, StepResult):
                return message
            if isinstance(message, CommandResult) and message.rank == rank:
                return message
            if message is not None:
                raise self.failure(rank, f"sent {type(message).__name__} while serving")
        return None

    def descriptors(self) -> list[int]:
        """To poll for reading: news, or a death."""
        return [pipe.fileno() for pipe in self._pipes]

    def laggard(self) -> WorkerError:
        """Blames the rank that the others wait for, if there is one: it took too long."""
        sights = self.look()

        def progress(rank: int) -> tuple[bool, int, int]:
            sight = sights[rank]
            return sight.activity.state not in STOPPED, self._workers[rank].num_phases, sight.distance

        done = self._loaded.keys() if len(self._loaded) < len(sights) else self._ready
        late = sorted(sights.keys() - done, key=progress)
        everyone = len(late) > 1 and progress(late[0]) == progress(late[-1])
        return self.failure(None if everyone else late[0], "took too long to start")

    def pids(self) -> dict[int, int]:
        """By rank."""
        return {rank: worker.child.pid for rank, worker in enumerate(self._workers)}

    def look(self) -> dict[int, Sight]:
        """What each rank is doing."""
        none = Compilation("", 0.0)
        return {
            rank: Sight(activity(pid), self._compilations.get(rank, none), distance)
            for (rank, pid), distance in zip(self.pids().items(), self._odometers.read(), strict=True)
        }

    def failure(self, rank: int | None, cause: str, *, silent: bool = False) -> WorkerError:
        """`rank` None: none more than the others."""
        phase = self._workers[rank or 0].phase
        return WorkerError(Fatal(rank, phase, ErrorInfo("dead", cause), time.monotonic()), silent=silent)

    # --- their end ----------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """The end of its pipe asks a worker to end."""
        for worker in self._workers:
            worker.pipe.close()

    def kill(self) -> None:
        """Those that are still there, whatever they are in the middle of: they have nothing to save."""
        for worker in self._workers:
            worker.child.kill()

    def is_gone(self) -> bool:
        return not any(worker.child.alive for worker in self._workers)

    def close(self, grace: float = 0.0) -> None:
        """End all, by force after `grace` seconds, and return when they are gone. Never raises."""
        self.hang_up()
        for worker in self._workers:
            worker.child.stop(grace)
        self._odometers.close()
        if self._meeting >= 0:
            os.close(self._meeting)
            self._meeting = -1

    # --- inside -------------------------------------------------------------------------------------

    def _start(self, config: EngineConfig, rank: int) -> _Worker:
        ours, theirs = socket_pair()
        with theirs:
            descriptors, rendezvous = [theirs.fileno(), self._odometers.fd], ""
            if self._meeting >= 0:
                descriptors.append(self._meeting)
                rendezvous = f"/proc/self/fd/{self._meeting}"
            start = WorkerStart(config, rank, theirs.fileno(), rendezvous, self._odometers.fd)
            child = spawn(f"worker {rank}", ENTRY, start, pass_fds=descriptors)
        return _Worker(child, Pipe(ours, FromWorker, _MAX_FRAME_BYTES))

    def _take_start_up(self, rank: int, message: FromWorker) -> None:
        worker, count = self._workers[rank], len(self._workers)
        match message:
            case Progress():
                worker.phase = message.phase
                worker.num_phases += 1
                self._progress(message)
            case Loaded() if rank not in self._loaded:
                self._loaded[rank] = message
                if len(self._loaded) == count:
                    self._broadcast(self._size_cache([self._loaded[each] for each in range(count)]))
            case WorkerReady() if len(self._loaded) == count and rank not in self._ready:
                self._ready.add(rank)
                worker.phase = SERVING
            case _:
                raise self.failure(rank, f"sent {type(message).__name__} out of turn")

    def _broadcast(self, message: ToWorker) -> None:
        data = frame(self._encoder.encode(message))
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.post_frame(data)
            except PipeClosedError:
                raise self._last_words(rank) from None

    def _hear(self, rank: int) -> Any:
        """A rank's next message if it is there; when it has failed, raises the first cause."""
        try:
            while isinstance(message := self._recv(rank), Prepared | Compiling):
                if isinstance(message, Prepared):
                    self._note_prepared(rank, message.count)
                else:
                    self._note_compiling(rank, message.kernel)
            return message
        except WorkerError as error:
            raise self._first_cause(error) from None

    def _note_prepared(self, rank: int, count: int) -> None:
        before = min(self._prepared)
        self._prepared[rank] = count
        if min(self._prepared) > before:
            self._broadcast(UsePrepared(min(self._prepared)))

    def _note_compiling(self, rank: int, kernel: str) -> None:
        before, now = self._compilations.get(rank), time.monotonic()
        begun = before.begun if before is not None and before.kernel == kernel else now
        self._compilations[rank] = Compilation(kernel, now, begun)
        if before is not None and now - before.begun > _NOTEWORTHY_SECONDS and before.kernel and not kernel:
            seconds = round(now - before.begun, 1)
            LOGGER.info("compiled a kernel", extra=fields(rank=rank, kernel=before.kernel, seconds=seconds))

    def _recv(self, rank: int) -> Any:
        try:
            message = self._pipes[rank].recv(0)
        except PipeClosedError:
            raise self._death(rank) from None
        except msgspec.DecodeError as error:
            raise self.failure(rank, f"sent what cannot be decoded: {error}") from None
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
        return self.failure(rank, "closed its pipe")

    def _first_cause(self, error: WorkerError) -> WorkerError:
        """Of `error` and whatever else has failed by now, the one that the others follow from.

        A rank that dies makes its peers fail in their collective operations, and these may be heard first:
        it failed before them. A rank that went without a word did not fail because of a peer.
        """
        found = [error]
        for rank in range(len(self._pipes)):
            try:
                while rank != error.fatal.rank and self._recv(rank) is not None:
                    pass
            except WorkerError as other:
                found.append(other)
        return min(found, key=lambda each: (not each.silent, each.fatal.at))

    def _death(self, rank: int) -> WorkerError:
        try:
            cause = self._workers[rank].child.cause_of_death()
        except subprocess.TimeoutExpired:
            cause = "closed its pipe"
        return self.failure(rank, cause, silent=True)
