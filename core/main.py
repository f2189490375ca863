"""The core process: its parts put together, its start reported, its end told. Entry: `run`."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from types import FrameType

import msgspec

from .. import __version__
from ..ipc.errors import ErrorInfo, HeadraceError
from ..ipc.messages import CoreStart, EngineInfo, Fatal, FromStarting, Progress, Ready
from ..ipc.sockets import ServerSocket
from .cache_size import size_cache
from .engine import Engine
from .workers import WorkerError, Workers

LOGGER = logging.getLogger(__name__)


def run(payload: bytes) -> None:
    """Serve as `payload` (a `CoreStart`) says. Exits 0 on SIGTERM and SIGINT, 1 on an error."""
    start = msgspec.json.decode(payload, type=CoreStart)
    level = logging.INFO if start.status_fd is None else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s core %(levelname)s: %(message)s")
    # A signal that comes just before a wait would not end it; its byte here does.
    wake, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    sys.exit(Core(start, wake.fileno()).run())


def _end(number: int, frame: FrameType | None) -> None:
    """Leave through the `finally` clauses, whatever the core is waiting for; once."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    LOGGER.info("ending: %s", signal.Signals(number).name)
    raise SystemExit(0)


class Core:
    """Start-up and end around `Engine.run`."""

    def __init__(self, start: CoreStart, wake: int) -> None:
        self._start = start
        self._wake = wake
        self._phase = "start"
        self._serving: Engine | None = None

    def run(self) -> int:
        """Serve; returns the exit code. The sockets outlive the engine, to carry the news of its death."""
        workers: Workers | None = None
        server: ServerSocket | None = None
        try:
            self._progress(Progress(None, "listen"))  # first: a bad address should not cost a model's load
            server = ServerSocket(self._start.address)
            self._progress(Progress(None, "start workers"))
            workers = Workers(self._start.config)
            self._serve(server, workers)
            return 0
        except Exception as error:  # the process's outermost frame: whatever it was, it is told and ends it
            self._tell(error)
            return 1
        finally:
            if workers is not None:
                workers.close()
            if server is not None:
                server.close()

    def _serve(self, server: ServerSocket, workers: Workers) -> None:
        config = self._start.config
        size = workers.bring_up(partial(size_cache, config), self._progress)
        info = EngineInfo(size.max_model_len, size.num_blocks, os.getpid(), __version__)
        self._serving = Engine(config, info, server, workers, self._wake)
        gc.collect()
        gc.freeze()  # what lives this long stays: later collections look at requests only
        self._report(Ready(self._start.address, info))
        LOGGER.info("%s at %s: %s", config.served_model_name, self._start.address, info)
        self._phase = "serving"
        self._serving.run()

    def _progress(self, progress: Progress) -> None:
        self._phase = progress.phase
        who = "core" if progress.rank is None else f"worker {progress.rank}"
        LOGGER.info("%s: %s", who, progress.phase)
        self._report(progress)

    def _tell(self, error: Exception) -> None:
        """Report the cause of the end once to everyone who waits for this core."""
        fatal = (
            error.fatal if isinstance(error, WorkerError) else Fatal(None, self._phase, ErrorInfo.of(error))
        )
        if not isinstance(error, HeadraceError):
            LOGGER.error("a fault of the core itself", exc_info=error)
        elif self._start.status_fd is None or self._serving is not None:
            LOGGER.error("%s", error)
        if self._serving is not None:
            self._serving.announce_death(
                msgspec.structs.replace(fatal.error, kind="dead", message=str(error))
            )
        self._report(fatal)

    def _report(self, message: FromStarting) -> None:
        """One line on the status pipe, if anyone holds its other end."""
        if self._start.status_fd is None:
            return
        # Broken: whoever started us has stopped listening, or is gone and the lifeline ends us.
        with suppress(BrokenPipeError):
            os.write(self._start.status_fd, msgspec.json.encode(message) + b"\n")
