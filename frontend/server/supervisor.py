"""Several server processes on one engine core, sharing one listening socket.

Each of them is `server.run` in a process of its own, attached to the core. The supervisor answers no
requests: it starts the core (unless it is told of one), starts the servers, and starts again whichever
dies or hangs. What a dead server was answering is lost; connections that nobody has
accepted yet go to the others.
"""

from __future__ import annotations

import logging
import math
import os
import selectors
import signal
import socket
import time
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from ...ipc import process
from ...ipc.config import EngineConfig
from ...ipc.errors import EngineDeadError
from ...ipc.exit_codes import ExitCode
from ...ipc.inspection import activity, print_stacks
from ..core_process import START_DEADLINE_SECONDS, CoreProcess
from ..engine_args import AsyncEngineArgs, resolve
from . import server
from .board import Board, make_place
from .listener import announce
from .options import ServerOptions
from .watches import LOOK_SECONDS, CoreWatch, ServerWatch

logger = logging.getLogger("headrace")

_YOUNG_SECONDS = 1.0
"""A server that dies younger than this is started again only after as long."""
_KILL_SECONDS = 5.0
"""What servers get to end on top of the time that their requests get."""


class ServerStart(msgspec.Struct):
    """How a server is started: the payload of its process."""

    listener: int
    """The descriptor of the bound socket."""
    ready: int
    """A pipe that gets one byte when it serves."""
    places: list[int]
    """Descriptors of the `Board`."""
    place: int
    """Its own of these."""
    options: ServerOptions
    engine_args: dict[str, Any]
    """Of `AsyncEngineArgs`."""
    keys: list[str]


class _Server(NamedTuple):
    child: process.Child
    pidfd: int
    started: float
    place: int
    watch: ServerWatch


def run_server(payload: bytes) -> None:
    """The entry of a server's process."""
    start = msgspec.json.decode(payload, type=ServerStart)
    listener = socket.socket(fileno=start.listener)
    server.live(
        start.options,
        lambda: server.run(
            listener,
            start.options,
            AsyncEngineArgs(**start.engine_args),
            start.keys,
            ready=start.ready,
            board=Board(start.places, start.place),
        ),
    )


class Supervisor:
    """`run` it once."""

    def __init__(
        self, listener: socket.socket, options: ServerOptions, args: AsyncEngineArgs, keys: list[str]
    ) -> None:
        self._listener = listener
        self._options = options
        self._args = args
        self._keys = keys
        self._core: CoreProcess | None = None
        self._watch: CoreWatch | None = None
        """Of our core, while it serves."""
        self._core_due = math.inf
        """When our core is to serve, while it starts again."""
        self._config: EngineConfig | None = None
        """Of our core, once it has served."""
        self._servers: dict[int, _Server] = {}
        """By pidfd."""
        self._due: list[float] = []
        """When servers that died young are to be started again."""
        self._num_ready = 0
        self._num_signals = 0
        self._deadline = math.inf
        """Then the servers are killed."""
        self._selector = selectors.DefaultSelector()
        self._ready, self._ready_write = os.pipe()
        self._places = [make_place() for _ in range(options.workers)]

    def run(self) -> ExitCode:
        """Serve until SIGTERM or SIGINT; returns the exit code. Raises HeadraceError at the start."""
        wake, waker = socket.socketpair()
        for end in (wake, waker):
            end.setblocking(False)
        try:
            self._start_core()
            signal.set_wakeup_fd(waker.fileno())
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
            self._selector.register(wake, selectors.EVENT_READ)
            self._selector.register(self._ready, selectors.EVENT_READ)
            for _ in range(self._options.workers):
                self._start_server()
            return self._supervise(wake)
        finally:
            signal.set_wakeup_fd(-1)
            wake.close()
            waker.close()
            for one in self._servers.values():
                one.child.stop(_KILL_SECONDS)
            self._stop_core()

    def _start_core(self) -> None:
        """The first one, unless we were told of one; returns when it serves."""
        if self._args.engine_core_address is not None:
            return
        config = resolve(self._args)
        self._core = CoreProcess(config)
        info = self._core.wait_until_ready()
        # The next one must have room for whatever this one has accepted.
        self._config = msgspec.structs.replace(
            config,
            num_gpu_blocks_override=info.num_blocks,
            max_model_len=info.max_model_len,
            max_model_len_is_explicit=True,
        )
        self._selector.register(self._core.status_fd, selectors.EVENT_READ)
        self._watch = CoreWatch(self._core, config.hang_seconds, self._selector)

    def _start_server(self) -> None:
        args = self._args
        if self._core is not None:
            args = AsyncEngineArgs(
                engine_core_address=self._core.address,
                engine_core_reconnect_seconds=START_DEADLINE_SECONDS,
                tokenizer=args.tokenizer,
            )
        taken = {one.place for one in self._servers.values()}
        place = next(place for place in self._places if place not in taken)
        listener, ready, places = self._listener.fileno(), self._ready_write, self._places
        start = ServerStart(
            listener, ready, places, place, self._options, msgspec.to_builtins(args), self._keys
        )
        child = process.spawn("server", f"{__name__}:run_server", start, pass_fds=(listener, ready, *places))
        pidfd = os.pidfd_open(child.pid)
        self._servers[pidfd] = _Server(
            child, pidfd, time.monotonic(), place, ServerWatch(place, self._args.hang_seconds)
        )
        self._selector.register(pidfd, selectors.EVENT_READ)

    def _supervise(self, wake: socket.socket) -> ExitCode:
        code = ExitCode.DONE
        while self._servers or (self._due and not self._num_signals):
            for key, _ in self._selector.select(self._seconds_left()):
                if key.fileobj is wake:
                    wake.recv(4096)
                elif key.fd == self._ready:
                    self._count_ready()
                elif key.fd in self._servers:
                    code = max(code, self._bury(self._servers[key.fd]))
            self._look_after_core()
            self._look_after_servers()
            while self._due and self._due[0] <= time.monotonic() and not self._num_signals:
                del self._due[0]
                self._start_server()
            if time.monotonic() > self._deadline:
                self._signal(signal.SIGKILL)
        return code

    def _seconds_left(self) -> float:
        """Until there is something to do."""
        now = time.monotonic()
        return max(min([self._deadline, now + LOOK_SECONDS, *self._due]) - now, 0.0)

    def _count_ready(self) -> None:
        before = self._num_ready
        self._num_ready += len(os.read(self._ready, 4096))
        if before < self._options.workers <= self._num_ready:
            announce(self._listener, self._options, f"{self._options.workers} workers")

    def _bury(self, dead: _Server) -> ExitCode:
        """Returns what the death means for our own exit code."""
        self._selector.unregister(dead.pidfd)
        os.close(dead.pidfd)
        del self._servers[dead.pidfd]
        cause = dead.child.cause_of_death()
        code = dead.child.exit_code
        dead.child.stop(0)
        if self._num_signals:
            dead.watch.look()
            cuts_nothing = code == ExitCode.DONE or not dead.watch.has_begun
            return ExitCode.DONE if cuts_nothing else ExitCode.CUT_OFF
        if self._num_ready < self._options.workers:
            self._on_signal(signal.SIGTERM, None)
            logger.error("%s before it served", cause)
            return ExitCode.CONFIG if code == ExitCode.CONFIG else ExitCode.FAULT
        logger.error("%s; another one is started", cause)
        self._due.append(max(time.monotonic(), dead.started + _YOUNG_SECONDS))
        return ExitCode.DONE

    def _look_after_core(self) -> None:
        """Another one, if it is dead or hangs: servers wait for it, and replay what they were answering.

        Raises HeadraceError when there can be no other.
        """
        core, watch, config = self._core, self._watch, self._config
        if core is None or config is None:
            return
        if watch is None:
            if core.poll() is not None:
                self._watch = CoreWatch(core, config.hang_seconds, self._selector)
            elif time.monotonic() > self._core_due:
                raise EngineDeadError(f"the engine did not start again within {START_DEADLINE_SECONDS:g} s")
            return
        if core.is_dead():
            cause = core.cause_of_death()
            if core.has_given_up():
                raise EngineDeadError(f"the engine is gone: {cause}")
        elif (silence := watch.look()) is not None:
            cause = f"the engine core hangs: silent for {silence:.0f} s ({core.show_stacks()})"
            core.kill()
        else:
            return
        logger.error("%s; another one is started", cause)
        self._stop_core()
        self._core = CoreProcess(config, core.folder)  # at the same address
        self._core_due = time.monotonic() + START_DEADLINE_SECONDS
        self._selector.register(self._core.status_fd, selectors.EVENT_READ)

    def _look_after_servers(self) -> None:
        """One that hangs is ended; its death is then noticed as any other."""
        if self._num_signals:
            return  # they have stopped writing, and there is a deadline
        for one in self._servers.values():
            if (silence := one.watch.look()) is not None:
                doing, pid = activity(one.child.pid), one.child.pid
                logger.error(
                    "a server (pid %d, %s) hangs: silent for %.0f s; its stacks:", pid, doing, silence
                )
                print_stacks(pid)
                one.child.kill()

    def _stop_core(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._core is not None:
            if self._core.status_fd in self._selector.get_map():
                self._selector.unregister(self._core.status_fd)
            self._core.stop()
        self._core = self._watch = None

    def _on_signal(self, number: int, frame: object) -> None:
        """The first lets requests finish, the second does not; the servers know the difference."""
        self._num_signals += 1
        self._deadline = min(self._deadline, time.monotonic() + self._options.drain_timeout + _KILL_SECONDS)
        self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        for one in self._servers.values():
            with suppress(ProcessLookupError):
                os.kill(one.child.pid, number)
