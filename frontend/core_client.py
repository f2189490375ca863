"""CoreClient: the connection to one engine core, on whatever event loop is running.

Knows messages, sockets and deaths; nothing of requests: what a step brought goes to `on_step`, which answers
with the numbers of requests to abort. Belongs to one loop at a time and moves to a new one by itself, so that
`asyncio.run` may be called again and again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import weakref
from collections.abc import Callable

import msgspec

from .. import __version__
from ..ipc.addresses import check_address, check_listening
from ..ipc.config import EngineConfig
from ..ipc.curve import ClientKeys
from ..ipc.errors import ConfigError, EngineDeadError
from ..ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    Argument,
    Bye,
    Call,
    CallMethod,
    Dying,
    EngineInfo,
    FromCore,
    Hello,
    Refused,
    Reply,
    StepOutputs,
    ToCore,
    Welcome,
)
from ..ipc.sockets import ClientSocket
from .core_process import CoreProcess

logger = logging.getLogger("headrace")

HANDSHAKE_SECONDS = 10.0
_LOOK_SECONDS = 0.1
"""How often the handshake looks whether the core has hung up."""
_MESSAGES_AT_ONCE = 16
"""Then the loop's other tasks get their turn."""


class _Connection:
    """What has to be given back: the socket, its places in the loop, and an embedded core's process."""

    def __init__(self, sock: ClientSocket, core: CoreProcess | None) -> None:
        self._socket = sock
        self._core = core
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.client: weakref.ref[CoreClient] | None = None
        self._is_closed = False

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch the descriptors in this loop, and in no other any more."""
        self._detach()
        self._loop = loop
        for descriptor in self._descriptors():
            loop.add_reader(descriptor, self._on_readable)

    def close(self) -> None:
        """Idempotent, from any thread; stops an embedded core."""
        if self._is_closed or os.getpid() != self._pid:
            return
        self._is_closed = True
        self._detach()
        if self._core is not None:
            self._core.stop()
        self._socket.close()

    def _descriptors(self) -> list[int]:
        status = [] if self._core is None else [self._core.status_fd]
        return [*self._socket.descriptors, *status]

    def _detach(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            for descriptor in self._descriptors():
                loop.remove_reader(descriptor)

    def _on_readable(self) -> None:
        client = None if self.client is None else self.client()
        if client is not None:
            client.drain()


class CoreClient:
    """One frontend's connection.

    Attributes:
        config, info: what the core told about itself.
        dead_error: why the connection is of no use any more, or None.
    """

    def __init__(
        self,
        sock: ClientSocket,
        core: CoreProcess | None,
        welcome: Welcome,
        on_step: Callable[[StepOutputs], list[int]],
        on_death: Callable[[EngineDeadError], None],
    ) -> None:
        """Use `embed` or `attach`. The two callables must not hold the client alive."""
        self.config: EngineConfig = welcome.config
        self.info: EngineInfo = welcome.info
        self.dead_error: EngineDeadError | None = None
        self._on_step = on_step
        self._on_death = on_death
        self._socket = sock
        self._core = core
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._next_call = 0
        self._drain_is_due = False
        self._connection = _Connection(sock, core)
        self._connection.client = weakref.ref(self)
        self._finalizer = weakref.finalize(self, self._connection.close)

    @classmethod
    def embed(
        cls,
        core: CoreProcess,
        on_step: Callable[[StepOutputs], list[int]],
        on_death: Callable[[EngineDeadError], None],
    ) -> CoreClient:
        """Connect to a core of our own that is ready; it ends with the client."""
        try:
            sock, welcome = connect(core.address, f"headrace {__version__}, pid {os.getpid()}")
        except BaseException:
            core.stop()
            raise
        return cls(sock, core, welcome, on_step, on_death)

    @classmethod
    def attach(
        cls,
        address: str,
        on_step: Callable[[StepOutputs], list[int]],
        on_death: Callable[[EngineDeadError], None],
        keys: ClientKeys | None = None,
    ) -> CoreClient:
        """Connect to a core that runs already. Raises ConfigError when there is none, or an unfitting one."""
        check_address(address, "engine_core_address", has_keys=keys is not None)
        check_listening(address, "engine_core_address")
        sock, welcome = connect(address, f"headrace {__version__}, pid {os.getpid()}", keys)
        return cls(sock, None, welcome, on_step, on_death)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it works on."""
        return self._loop

    def use_running_loop(self) -> None:
        """Move to the running loop. Raises EngineDeadError, and RuntimeError while another loop runs."""
        self._raise_if_dead()
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if self._loop is not None and self._loop.is_running():
            raise RuntimeError("the engine is in use on another event loop; make one engine for each loop")
        self._loop = loop
        self._calls.clear()  # whoever waited for them is gone with the old loop
        self._connection.attach(loop)
        self._drain_soon(loop)

    def send(self, message: ToCore) -> None:
        """Send from the running loop. Raises EngineDeadError."""
        self.use_running_loop()
        self._socket.send(message)
        assert self._loop is not None
        self._drain_soon(self._loop)  # sending can swallow the edge that tells of a message

    async def call(
        self,
        method: CallMethod,
        seconds: float | None = None,
        arguments: dict[str, Argument] | None = None,
    ) -> Reply:
        """Ask the core, wait at most `seconds`. Raises the reply's error, EngineDeadError, TimeoutError."""
        self.use_running_loop()
        number = self._next_call
        self._next_call = (number + 1) % 2**31
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            self.send(Call(number, method, arguments or {}))
            async with asyncio.timeout(seconds):
                reply = await future
        finally:
            self._calls.pop(number, None)
        if reply.error is not None:
            raise reply.error.exception()
        return reply

    def close(self) -> None:
        """Leave the core; an embedded one is stopped. Pending calls fail. Idempotent."""
        if self.dead_error is None:
            if self._core is None:
                self._socket.send(Bye())
            self._die(EngineDeadError("the engine has been shut down"))
        self._finalizer()

    def drain(self) -> None:
        """Take in what has arrived; called by the loop."""
        self._drain_is_due = False
        if self.dead_error is not None:
            return
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                message = self._socket.recv()
            except msgspec.DecodeError as error:
                self._die(EngineDeadError(f"the engine core sent what cannot be read: {error}"))
                return
            if message is None:
                self._look_for_death()
                return
            self._handle(message)
            if self.dead_error is not None:
                return
        if self._loop is not None:
            self._drain_soon(self._loop)

    def _handle(self, message: FromCore) -> None:
        match message:
            case StepOutputs():
                if unwanted := self._on_step(message):
                    self._socket.send(Abort(unwanted))  # the drain that we are in goes on until nothing comes
            case Reply():
                future = self._calls.get(message.call)
                if future is not None and not future.done():
                    future.set_result(message)
            case Dying(error):
                self._die(EngineDeadError(error.message))
            case Refused():
                self._die(EngineDeadError(f"the engine core refused this client: {message.message}"))
            case Welcome():
                logger.warning("the engine core said welcome twice")

    def _look_for_death(self) -> None:
        if self._core is not None and self._core.is_dead():
            self._die(EngineDeadError(f"the engine is gone: {self._core.cause_of_death()}"))
        elif self._socket.lost_connection():
            self._die(EngineDeadError("the connection to the engine core was lost"))

    def _die(self, error: EngineDeadError) -> None:
        self.dead_error = error
        calls, self._calls = self._calls, {}
        for future in calls.values():
            if not future.done() and not future.get_loop().is_closed():
                future.set_exception(EngineDeadError(str(error)))
        self._on_death(error)
        self._finalizer()

    def _raise_if_dead(self) -> None:
        if self.dead_error is not None:
            raise EngineDeadError(str(self.dead_error))

    def _drain_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._drain_is_due:
            self._drain_is_due = True
            loop.call_soon(self._drain_if_alive, weakref.ref(self))

    @staticmethod
    def _drain_if_alive(reference: weakref.ref[CoreClient]) -> None:
        client = reference()
        if client is not None:
            client.drain()


def connect(address: str, name: str, keys: ClientKeys | None = None) -> tuple[ClientSocket, Welcome]:
    """Shake hands with the core there, as `name`. Raises ConfigError."""
    sock = ClientSocket(address, keys)
    try:
        sock.send(Hello(PROTOCOL_VERSION, name))
        return sock, _await_welcome(sock, address)
    except BaseException:
        sock.close()
        raise


def _await_welcome(sock: ClientSocket, address: str) -> Welcome:
    deadline = time.monotonic() + HANDSHAKE_SECONDS
    reason = f"no answer within {HANDSHAKE_SECONDS:g} s"
    try:
        while (left := deadline - time.monotonic()) > 0:
            message = sock.recv(min(left, _LOOK_SECONDS))
            if message is None and sock.lost_connection():
                reason = "it hung up: does it use CURVE keys, and are these the right ones?"
                break
            if isinstance(message, Welcome):
                if message.protocol == PROTOCOL_VERSION:
                    return message
                reason = f"it speaks protocol {message.protocol}, this is protocol {PROTOCOL_VERSION}"
                break
            if isinstance(message, Refused):
                reason = message.message
                break
    except msgspec.DecodeError as error:
        reason = f"its answer cannot be read, perhaps it is of another version: {error}"
    message_text = f"engine_core_address: cannot use the engine core at {address!r}: {reason}"
    raise ConfigError(
        message_text, parameter="engine_core_address", value=address, limit=f"protocol {PROTOCOL_VERSION}"
    )
