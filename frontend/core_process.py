"""An engine core as this process's child: its start, with every phase shown, and its end.

The core's own children are its business. What keeps the promise that nothing is left running: the child
follows its standard input (`ipc.process`), and `stop` is called by a finalizer, at the latest when the
interpreter ends.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import zmq

from ..ipc import process
from ..ipc.config import EngineConfig
from ..ipc.errors import ConfigError, EngineDeadError
from ..ipc.inspection import activity, descendants, print_stacks
from ..ipc.messages import EngineInfo, Fatal, FromStarting, Progress, Ready
from ..ipc.payloads import CoreStart
from ..ipc.pipe import wait
from .checks import is_unicode
from .status_lines import StatusLines

logger = logging.getLogger("headrace")

START_DEADLINE_SECONDS = 600.0
"""vLLM's; a first start may have to load a large model from a slow disk."""
STOP_GRACE_SECONDS = 5.0


class CoreProcess:
    """A child engine core. `start` it, use `address`, `stop` it."""

    def __init__(self, config: EngineConfig, folder: Path | None = None) -> None:
        """Begin to start it; returns at once. `folder` is that of one that has ended, to have its address."""
        self._pid = os.getpid()
        self.folder = folder or _private_folder()
        self.address = f"ipc://{self.folder / 'core'}"
        self._display = _Display()
        self._lines = StatusLines()
        process.fill_standard_descriptors()
        self.status_fd, theirs = os.pipe()
        os.set_blocking(self.status_fd, False)
        try:
            self._child = process.spawn(
                "engine core",
                "headrace.core.main:run",
                CoreStart(config=config, address=self.address, status_fd=theirs),
                pass_fds=(theirs,),
                remove=str(self.folder),
            )
        except BaseException:
            os.close(self.status_fd)
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        finally:
            os.close(theirs)

    @property
    def pid(self) -> int:
        return self._child.pid

    def wait_until_ready(self, deadline_seconds: float = START_DEADLINE_SECONDS) -> EngineInfo:
        """Block until the core serves. Raises the error that stopped it, or EngineDeadError.

        After an error it has been stopped.
        """
        try:
            return self._wait_until_ready(time.monotonic() + deadline_seconds, deadline_seconds)
        except BaseException:
            self.stop()
            raise
        finally:
            self._display.close()

    def poll(self) -> EngineInfo | None:
        """The same without waiting: None as long as it starts."""
        try:
            data = os.read(self.status_fd, 65536)
        except BlockingIOError:
            return None
        if not data:
            raise EngineDeadError(f"the engine did not start: {self._how_it_ended()}")
        return self._follow(self._lines.feed(data))

    def is_dead(self) -> bool:
        """True when the status pipe has ended. Never blocks; what else the pipe says is dropped."""
        try:
            while data := os.read(self.status_fd, 65536):
                self._lines.keep(data)
        except BlockingIOError:
            return False
        return True

    def cause_of_death(self) -> str:
        """For an error message, after `is_dead`: what the core said last, or how it ended."""
        fatal = self._lines.last_words()
        return self._how_it_ended() if fatal is None else _describe(fatal)

    def has_given_up(self) -> bool:
        """After `is_dead`: its workers do not come back, so another core would be of no use."""
        fatal = self._lines.last_words()
        return fatal is not None and fatal.rank is not None

    def show_stacks(self) -> str:
        """Have it and everything below it print its stacks to standard error; returns what it is doing."""
        doing = activity(self.pid)
        family = descendants(self.pid)
        logger.error(
            "the engine core (pid %d, %s) hangs; its stacks, and those of %s:", self.pid, doing, family
        )
        for pid in (self.pid, *family):
            print_stacks(pid)
        return str(doing)

    def kill(self) -> None:
        """End one that does not answer any more; follow up with `stop`."""
        self._child.kill()

    def stop(self) -> None:
        """End it and everything below it, and remove its folder. Idempotent; nothing in a forked process."""
        if os.getpid() != self._pid or self.status_fd < 0:
            return
        self._child.stop(STOP_GRACE_SECONDS)
        os.close(self.status_fd)
        self.status_fd = -1
        shutil.rmtree(self.folder, ignore_errors=True)

    def _how_it_ended(self) -> str:
        try:
            return self._child.cause_of_death()
        except subprocess.TimeoutExpired:
            return f"{self._child.name} (pid {self.pid}) has stopped talking"

    def _wait_until_ready(self, deadline: float, seconds: float) -> EngineInfo:
        while True:
            if (info := self._follow(self._read(deadline, seconds))) is not None:
                return info

    def _follow(self, messages: list[FromStarting]) -> EngineInfo | None:
        for message in messages:
            match message:
                case Progress(rank, phase):
                    self._display.show(rank, phase)
                case Ready(_, info):
                    return info
                case Fatal():
                    error = message.error.exception()
                    if isinstance(error, EngineDeadError):
                        raise EngineDeadError(f"the engine did not start: {_describe(message)}")
                    raise error
        return None

    def _read(self, deadline: float, seconds: float) -> list[FromStarting]:
        """Wait for the next lines of the status pipe."""
        left = deadline - time.monotonic()
        if left <= 0 or not wait([self.status_fd], left):
            phase = self._display.last or "the first sign of life"
            raise EngineDeadError(f"the engine did not start within {seconds:g} s; it is at: {phase}")
        data = os.read(self.status_fd, 65536)
        if not data:
            raise EngineDeadError(f"the engine did not start: {self._how_it_ended()}")
        return self._lines.feed(data)


def _describe(message: Fatal) -> str:
    where = "the engine core" if message.rank is None else f"worker {message.rank}"
    return f"{where}, at {message.phase!r}: {message.error.message}"


def _private_folder() -> Path:
    """A new folder that only we can enter, with a path that a socket in it can have. Raises ConfigError."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="headrace-"))
        if not is_unicode(str(folder)) or len(os.fsencode(folder / "core")) > zmq.IPC_PATH_MAX_LEN:
            folder.rmdir()
            folder = Path(tempfile.mkdtemp(prefix="headrace-", dir="/tmp"))
    except OSError as error:
        message = f"no folder for the engine's socket: {error}; set TMPDIR to one that can be written to"
        raise ConfigError(message, parameter="TMPDIR", value=os.environ.get("TMPDIR")) from error
    return folder


class _Display:
    """Start-up phases: one line that changes on a terminal, log lines (level INFO) otherwise."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._is_terminal = sys.stderr is not None and sys.stderr.isatty()
        self.last = ""
        """The phase shown last."""

    def show(self, rank: int | None, phase: str) -> None:
        self.last = phase if rank is None else f"{phase} (worker {rank})"
        seconds = time.monotonic() - self._start
        logger.info("starting, %.1f s: %s", seconds, self.last)
        if self._is_terminal:
            sys.stderr.write(f"\r\x1b[2Kheadrace: {seconds:.1f} s, {self.last}")
            sys.stderr.flush()

    def close(self) -> None:
        if self._is_terminal and self.last:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
