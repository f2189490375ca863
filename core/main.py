"""The core process: its parts put together, its start reported, its end told. Entry: `run`."""

from __future__ import annotations

import gc
import logging
import os
import resource
import signal
import sys
import uuid
from contextlib import suppress
from functools import partial

import msgspec

from .. import __version__
from ..ipc import logs
from ..ipc.errors import ConfigError, ErrorInfo, HeadraceError
from ..ipc.exit_codes import ExitCode
from ..ipc.logs import fields
from ..ipc.messages import EngineInfo, Fatal, FromStarting, Progress, Ready
from ..ipc.payloads import CoreStart, Daemon
from ..ipc.sockets import ServerSocket
from .cache_size import size_cache
from .engine import Engine
from .ranks import WorkerError
from .signals import Signals
from .supervisor import Supervisor
from .workers import Workers

LOGGER = logging.getLogger(__name__)


def run(payload: bytes) -> None:
    """Serve as `payload` (a `CoreStart`) says, and exit with an `ExitCode`."""
    start = msgspec.json.decode(payload, type=CoreStart)
    # libzmq aborts the process when a connection finds no descriptor left; shells allow 1024 unless asked.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # A child reports on its status pipe: its log is for what nobody expects.
    daemon = start.daemon or Daemon()
    logs.configure(daemon.log_format, logging.WARNING if start.daemon is None else logging.INFO)
    sys.exit(Core(start, daemon, Signals()).run())


class Core:
    """Start-up and end around `Engine.run`."""

    def __init__(self, start: CoreStart, daemon: Daemon, signals: Signals) -> None:
        self._start = start
        self._daemon = daemon
        self._signals = signals
        self._supervisor = Supervisor(daemon)
        self._phase = "start"
        self._server: ServerSocket | None = None
        self._serving: Engine | None = None

    def run(self) -> ExitCode:
        """Serve until the end. The sockets outlive the engine, to carry the news of its death."""
        workers: Workers | None = None
        try:
            self._progress(Progress(None, "listen"))  # first: a bad address should not cost a model's load
            self._server = ServerSocket(self._start.address, self._daemon.keys)
            self._progress(Progress(None, "start workers"))
            workers = Workers(self._start.config)
            return self._serve(self._server, workers)
        except Exception as error:  # the process's outermost frame: whatever it was, it is told and ends it
            self._tell(error)
            return ExitCode.CONFIG if _is_config_error(error) else ExitCode.FAULT
        finally:
            self._supervisor.stopping("ending")
            if workers is not None:
                workers.close()
            if self._server is not None:
                self._server.close()

    def _serve(self, server: ServerSocket, workers: Workers) -> ExitCode:
        config = self._start.config
        size = workers.bring_up(partial(size_cache, config), self._progress)
        info = EngineInfo(size.max_model_len, size.num_blocks, os.getpid(), __version__, uuid.uuid4().hex)
        self._serving = Engine(config, info, server, workers, self._signals.fileno(), self._attend)
        gc.collect()
        gc.freeze()  # what lives this long stays: later collections look at requests only
        if self._start.daemon is not None:
            self._signals.defer()
        self._announce(Ready(self._start.address, info))
        self._phase = "serving"
        cut_off = self._serving.run()
        LOGGER.info("end", extra=fields(requests_cut_off=cut_off))
        return ExitCode.CUT_OFF if cut_off else ExitCode.DONE

    def _attend(self) -> None:
        """Once a second, and after a signal: do what signals ask, and show that the loop turns."""
        for number in self._signals.take():
            if number is signal.SIGHUP:
                self._reload()
            elif self._serving is not None:
                self._drain(self._serving, number)
        self._supervisor.beat()

    def _reload(self) -> None:
        """SIGHUP: the keys of clients may have changed. Keeps the old ones when the new are of no use."""
        if self._server is None:
            return
        try:
            self._server.reload_keys()
        except ConfigError as error:
            LOGGER.error("reload failed", extra=fields(error=str(error)))
        else:
            LOGGER.info("reloaded")

    def _drain(self, engine: Engine, number: signal.Signals) -> None:
        seconds = self._daemon.drain_seconds
        self._supervisor.stopping("draining")
        LOGGER.info(
            "draining", extra=fields(signal=number.name, requests=engine.num_requests, seconds=seconds)
        )
        engine.drain(seconds)

    def _progress(self, progress: Progress) -> None:
        self._phase = progress.phase
        who = "core" if progress.rank is None else f"worker {progress.rank}"
        LOGGER.info("starting", extra=fields(who=who, phase=progress.phase))
        self._supervisor.status(f"starting: {who}: {progress.phase}")
        self._report(progress)

    def _announce(self, ready: Ready) -> None:
        name, info = self._start.config.served_model_name, ready.info
        LOGGER.info(
            "serving", extra=fields(model=name, address=ready.address, **msgspec.structs.asdict(info))
        )
        self._supervisor.ready(msgspec.json.encode(ready), f"serving {name} at {ready.address}")
        self._report(ready)

    def _tell(self, error: Exception) -> None:
        """Report the cause of the end once to everyone who waits for this core.

        Clients hear of it when another core would be of no use, for the workers do not come back. A fault of
        the core itself ends this one only: its clients look for the next.
        """
        fatal = (
            error.fatal if isinstance(error, WorkerError) else Fatal(None, self._phase, ErrorInfo.of(error))
        )
        if not isinstance(error, HeadraceError):
            LOGGER.error("a fault of the core itself", exc_info=error)
        elif self._start.status_fd is None or self._serving is not None:
            LOGGER.error("cannot go on", extra=fields(error=str(error), phase=fatal.phase, rank=fatal.rank))
        if self._serving is not None and isinstance(error, WorkerError):
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


def _is_config_error(error: Exception) -> bool:
    kind = error.fatal.error.kind if isinstance(error, WorkerError) else ErrorInfo.of(error).kind
    return kind == "config"
