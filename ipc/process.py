"""Child processes: started by entry-point name, ended with their parent.

A child's standard input is a pipe whose other end only the parent holds: it brings the payload as one line
of JSON, and its end of file means that the parent is gone, however it went. No child outlives its parent.
Nothing is pickled and `__main__` is not imported again, so programs need no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import msgspec

from .errors import ConfigError
from .exit_codes import ExitCode
from .inspection import STACKS_SIGNAL

_NO_PARENT = 0
_STANDARD_ERROR = 2
_PR_SET_PDEATHSIG = 1


class Child:
    """A running child process."""

    def __init__(self, name: str, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -n when signal n killed it."""
        return self._process.poll()

    def cause_of_death(self) -> str:
        """How it ended, for an error message; call it once the child is not alive."""
        code = self._process.wait(timeout=5)
        if code < 0:
            known = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            return f"{self.name} (pid {self.pid}) was killed by {known}"
        return f"{self.name} (pid {self.pid}) exited with code {code}"

    def kill(self) -> None:
        """SIGKILL; returns at once."""
        self._process.kill()

    def stop(self, grace: float) -> None:
        """End it: SIGTERM, then SIGKILL after `grace` seconds. Returns once it is gone; idempotent."""
        assert self._process.stdin is not None
        if self.alive:
            self._process.terminate()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(BrokenPipeError):  # it died before it had read its payload
            self._process.stdin.close()


def spawn(
    name: str,
    entry: str,
    payload: msgspec.Struct,
    *,
    pass_fds: Sequence[int] = (),
    remove: str | None = None,
) -> Child:
    """Run `module:function(payload as JSON bytes)` in a fresh interpreter.

    The child has its own session, so that Ctrl-C reaches the parent alone, which then ends the child in
    good order. Its standard output goes to standard error: a program's output stays its own. `-P` keeps the
    working directory off `sys.path`. A child whose parent vanishes exits; at its end, whichever it is, it
    deletes the folder `remove`. Raises ConfigError for a payload that cannot be told, and off Linux.
    """
    line = _payload_line(payload)
    command = [sys.executable, "-P", "-m", __name__, entry, str(os.getpid()), remove or ""]
    # Where it was closed when this process began, something else has its number by now.
    output = _STANDARD_ERROR if sys.__stderr__ is not None else subprocess.DEVNULL
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it died at once: whoever waits for its first message will say so
    return Child(name, process)


def become(entry: str, payload: msgspec.Struct) -> NoReturn:
    """Replace this process by `module:function(payload)`, keeping its pid: how a daemon starts.

    Raises ConfigError as `spawn` does.
    """
    line = _payload_line(payload)
    file = os.memfd_create("payload")
    os.write(file, line)
    os.lseek(file, 0, os.SEEK_SET)
    os.dup2(file, 0)
    os.execv(sys.executable, [sys.executable, "-P", "-m", __name__, entry, str(_NO_PARENT), ""])


def _payload_line(payload: msgspec.Struct) -> bytes:
    check_platform()
    try:
        return msgspec.json.encode(payload) + b"\n"
    except UnicodeEncodeError as error:  # a path's bytes that the locale cannot read
        message = f"{error.object!a} is no text: use names in UTF-8, and a locale that has them"
        raise ConfigError(message, value=ascii(error.object), limit="UTF-8") from error


def check_platform() -> None:
    """Raises ConfigError where Headrace's processes cannot run."""
    if sys.platform != "linux":
        message = f"Headrace's engine and server run on Linux; this is {sys.platform}"
        raise ConfigError(message, value=sys.platform, limit="linux")


def _follow_parent(parent: int, remove: str) -> None:
    poller = select.poll()
    poller.register(0, select.POLLIN)
    # The parent's pid is the second witness: a process that the parent forked may still hold the pipe.
    while not poller.poll(1000) and os.getppid() == parent:
        pass
    if remove:
        shutil.rmtree(remove, ignore_errors=True)
    os._exit(ExitCode.PARENT_GONE)


def take_over() -> None:
    """For a process of our own: undo what it may have inherited and cannot work with.

    Signals that are blocked would not end it, and of children that end while SIGCHLD is ignored nobody is
    told how.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    fill_standard_descriptors()


def fill_standard_descriptors() -> None:
    """Open the null device as whichever of standard input, output and error is closed.

    Else the next pipe has its number, and is lost in a child, which has its own standard streams there.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        os.set_inheritable(number, True)
    os.close(number)


def die_with_parent() -> None:
    """The kernel is to kill this process when its parent ends, even if it is stopped or hangs by then.

    Only for children of processes with a single thread: it is the end of the thread that started the child
    which counts.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    take_over()
    if sys.stderr is not None:
        faulthandler.enable()
        faulthandler.register(STACKS_SIGNAL)
    entry, parent, remove = sys.argv[1:]
    payload = sys.stdin.buffer.readline()
    if not payload:  # the parent is gone already
        shutil.rmtree(remove, ignore_errors=True)
        sys.exit(ExitCode.PARENT_GONE)
    if int(parent) != _NO_PARENT:
        following = (int(parent), remove)
        threading.Thread(target=_follow_parent, args=following, name="parent", daemon=True).start()
    module, _, function = entry.partition(":")
    try:
        getattr(importlib.import_module(module), function)(payload)
    finally:
        if remove:  # a parent that was killed cannot do it
            shutil.rmtree(remove, ignore_errors=True)


if __name__ == "__main__":
    main()
