"""CoreClient: the connection to one engine core, on whatever event loop is running.

Knows messages, sockets, deaths and returns; nothing of requests: these are a `Requests`' affair, which takes
in what a step brought and says what a new core has to be told. Belongs to one loop at a time and moves to a
new one by itself, so that `asyncio.run` may be called again and again.

A core that is lost comes back: an embedded one is started again, one that was attached to is waited for. The
connection to it is always a new one, with a new name, so that nothing which was meant for the old one can
arrive twice: the core forgets the old name and its requests, and is told of them anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ..ipc.addresses import check_address, check_listening
from ..ipc.config import EngineConfig
from ..ipc.curve import ClientKeys
from ..ipc.errors import ConfigError, EngineDeadError, HeadraceError
from ..ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
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
from .calls import PendingCalls
from .connection import Connection
from .core_process import START_DEADLINE_SECONDS, CoreProcess
from .handshake import client_name, connect

logger = logging.getLogger("headrace")

MAX_LOSSES = 3
"""Cores lost in a row without a token from them; the next one is the engine's end."""
_LOOK_SECONDS = 1.0
_SUSPICIOUS_SECONDS = 3.0
_RETRY_SECONDS = 0.2
"""Between two connections to a core that is coming back."""
_DYING_SECONDS = 0.5
"""From the end of an embedded core's connection to the end of the core."""
_HUNG_UP = "the connection to the engine core was lost"
_MESSAGES_AT_ONCE = 16
"""Then the loop's other tasks get their turn."""
_SAME_TOKENS = ("model_path", "hf_config", "load_format", "dtype", "vocab_size")
"""What must not change under the requests of a core that comes back."""


class Requests(Protocol):
    """The requests that the core works on. It must not hold the client alive."""

    def apply(self, message: StepOutputs) -> list[int]:
        """Note what a step brought; returns the numbers of requests to abort."""

    def fail_all(self, error: Exception) -> None:
        """There will be no core any more."""

    def lose_core(self, max_replays: int, *, beyond_doubt: bool) -> None:
        """The core is gone, and all that it knew; `beyond_doubt`: only one of these can be the cause."""

    def lose_connection(self) -> None:
        """The core lives, but has forgotten them."""

    @property
    def owes_replays(self) -> bool:
        """`replays` is to be asked."""

    @property
    def has_suspects(self) -> bool:
        """Cores may have died of some of them: these are tried one by one, when it is our turn."""

    def replays(self, *, may_try: bool) -> list[AddRequest]:
        """What to tell the new core now; of suspects only with `may_try`."""


@dataclass(frozen=True)
class _Outage:
    """There is no core at present."""

    cause: str
    began: float
    deadline: float
    """Both of time.monotonic()."""
    beyond_doubt: bool
    """If one of the requests was the cause, it is one of ours."""


class CoreClient:
    """One frontend's connection.

    Attributes:
        config, info: what the core told about itself.
        dead_error: why the connection is of no use any more, or None.
        num_restarts: how often a core was lost and came back.
    """

    def __init__(
        self,
        connection: Connection,
        welcome: Welcome,
        requests: Requests,
        address: str,
        keys: ClientKeys | None,
        patience: float,
    ) -> None:
        """Use `embed` or `attach`."""
        self.config: EngineConfig = welcome.config
        self.info: EngineInfo = welcome.info
        self.dead_error: EngineDeadError | None = None
        self.num_restarts = 0
        self._requests = requests
        self._address = address
        self._keys = keys
        self._patience = patience
        """Seconds to wait for a lost core."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls = PendingCalls()
        self._drain_is_due = False
        self._broken: ClientSocket | None = None
        """Its connection is lost, and what had come before is being taken in."""
        self._outage: _Outage | None = None
        self._turn_call = -1
        """Of the call by which we asked the core for the turn to try suspects; -1: we did not."""
        self._has_turn = False
        self._silence = 0.0
        """Seconds without a message: a core sends at least one a second."""
        self._last_look = 0.0
        self._num_refusals = 0
        self._losses: list[str] = []
        """Their causes, since a core brought tokens."""
        self._connection = connection
        connection.client = weakref.ref(self)
        self._finalizer = weakref.finalize(self, connection.close)

    @classmethod
    def embed(cls, core: CoreProcess, requests: Requests) -> CoreClient:
        """Connect to a core of our own that is ready; it ends with the client."""
        try:
            sock, welcome = connect(core.address, client_name())
        except BaseException:
            core.stop()
            raise
        return cls(Connection(sock, core), welcome, requests, core.address, None, START_DEADLINE_SECONDS)

    @classmethod
    def attach(cls, address: str, requests: Requests, keys: ClientKeys | None, patience: float) -> CoreClient:
        """Connect to somebody's core; wait `patience` seconds for it to be ready, and whenever it is gone.

        Raises ConfigError when there is none, or an unfitting one.
        """
        check_address(address, "engine_core_address", has_keys=keys is not None)
        check_listening(address, "engine_core_address")
        sock, welcome = connect(address, client_name(), keys, patience)
        return cls(Connection(sock, None), welcome, requests, address, keys, patience)

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The event loop that it works on."""
        return self._loop

    @property
    def trouble(self) -> str:
        """Why there is no core at present; empty when there is one, as far as is known."""
        if self._outage is None:
            silent = self._silence >= _SUSPICIOUS_SECONDS
            return f"the engine core has been silent for {self._silence:.0f} s" if silent else ""
        seconds = time.monotonic() - self._outage.began
        return f"there has been no engine core for {seconds:.1f} s, since {self._outage.cause}"

    def use_running_loop(self) -> None:
        """Move to the running loop. Raises EngineDeadError, and RuntimeError while another loop runs."""
        self._raise_if_dead()
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        if self._loop is not None and self._loop.is_running():
            raise RuntimeError("the engine is in use on another event loop; make one engine for each loop")
        self._loop = loop
        self._calls.forget_all()
        self._connection.attach(loop)
        self._arm_timers()
        self._drain_is_due = False  # what the old loop was to do it may not have done
        self._drain_soon()
        self._look(loop)

    def send(self, message: ToCore) -> bool:
        """Send from the running loop. Raises EngineDeadError.

        False when there is no core at present: the next one learns of the requests and calls that there are
        then.
        """
        self.use_running_loop()
        sock = self._connection.socket
        if self._outage is not None or sock is None:
            return False
        sock.send(message)
        self._drain_soon()  # sending can swallow the edge that tells of a message
        return True

    async def call(
        self,
        method: CallMethod,
        seconds: float | None = None,
        arguments: dict[str, Argument] | None = None,
    ) -> Reply:
        """Ask the core, wait at most `seconds`.

        Raises the reply's error, EngineDeadError, TimeoutError, and RequestCrashedError when cores die of it.
        """
        self.use_running_loop()
        call = self._calls.begin(method, arguments or {})
        try:
            self.send(call.message)
            async with asyncio.timeout(seconds):
                reply = await call.reply
        finally:
            self._calls.end(call)
        if reply.error is not None:
            raise reply.error.exception()
        return reply

    def close(self) -> None:
        """Leave the core; an embedded one is stopped. Pending calls fail. Idempotent.

        Nothing in a forked process.
        """
        if self.dead_error is None and not self._connection.is_inherited:
            sock = self._connection.socket
            if self._connection.core is None and self._outage is None and sock is not None:
                sock.send(Bye())
            self._die("the engine has been shut down")
        self._finalizer()

    def drain(self) -> None:
        """Take in what has arrived; called by the loop."""
        self._drain_is_due = False
        for _ in range(_MESSAGES_AT_ONCE):
            sock = self._connection.socket
            if self.dead_error is not None:
                return
            if sock is None:
                self._look_for_return()
                return
            try:
                message = sock.recv()
            except msgspec.DecodeError as error:
                self._die(f"the engine core sent what cannot be read: {error}")
                return
            if message is None:
                if sock is not self._broken and sock.lost_connection():
                    self._broken = sock  # the core's last words may have come since we looked
                    continue
                self._look_for_death(sock)
                return
            try:
                self._handle(sock, message)
            except Exception as error:
                # Whoever is at fault: nobody must wait for ever for what this message should have brought.
                logger.exception("what the engine core sent makes no sense")
                self._die(f"what the engine core sent makes no sense: {error}")
                return
        self._drain_soon()

    def _handle(self, sock: ClientSocket, message: FromCore) -> None:
        self._silence = 0.0
        match message:
            case StepOutputs():
                if message.requests:
                    self._losses.clear()
                if unwanted := self._requests.apply(message):
                    sock.send(Abort(unwanted))  # the drain that we are in goes on until nothing comes
                if self._requests.owes_replays or self._turn_call >= 0:
                    self._send_replays(sock)
            case Reply() if message.call == self._turn_call:
                self._has_turn = True
                self._send_replays(sock)
            case Reply():
                self._calls.answer(message)
            case Dying(error):
                self._die(error.message)
            case Refused():
                cause = f"the engine core refused this client: {message.message}"
                self._num_refusals += 1  # not for ever: a core can refuse as often as it says welcome
                if self._outage is None and self._num_refusals <= MAX_LOSSES:
                    # It may have given us up for not reading.
                    self._lose(cause, is_alive=True)
                else:
                    self._die(cause)
            case Welcome():
                self._resume(sock, message)

    # --- losing a core and finding it again -----------------------------------------------------------

    def _look_for_death(self, sock: ClientSocket) -> None:
        core = self._connection.core
        if core is not None and core.is_dead():
            cause = core.cause_of_death()
            if core.has_given_up():
                self._die(f"the engine is gone: {cause}")
            else:
                self._lose(cause)
        elif sock is self._broken:
            self._broken = None
            if core is None or self._loop is None:
                self._lose(_HUNG_UP)
            else:  # it is about to die, and to say why
                self._loop.call_later(_DYING_SECONDS, _call, weakref.WeakMethod(self._replace_silent), core)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """Once a second: is the core still there, and not just its process?"""
        if loop is not self._loop or self.dead_error is not None:
            return
        now = time.monotonic()
        # While this loop did not run, what the core has said could not be heard.
        elapsed = min(now - self._last_look, 2 * _LOOK_SECONDS)
        self._last_look = now
        self._silence = 0.0 if self._outage is not None else self._silence + elapsed
        core = self._connection.core
        if core is not None and self._silence >= self.config.hang_seconds:
            cause = f"the engine core hangs: silent for {self._silence:.0f} s ({core.show_stacks()})"
            self._lose(cause)
        loop.call_later(_LOOK_SECONDS, _call, weakref.WeakMethod(self._look), loop)

    def _lose(self, cause: str, *, is_alive: bool = False) -> None:
        """The core is gone, or knows us no more: get another one, or greet it anew."""
        awaits_turn = self._turn_call >= 0 and not self._has_turn
        if (self._outage is None and not awaits_turn) or self._connection.core is not None:
            self._losses.append(cause)
        if len(self._losses) > MAX_LOSSES:
            self._die(f"the engine is gone: {self._losses[0]}; it did not come back: {cause}")
            return
        logger.warning("lost the engine core, waiting for its return: %s", cause)
        if self._outage is None:
            now = time.monotonic()
            doubt = self._calls.have_lost_cores or not self._may_try
            self._outage = _Outage(cause, now, now + self._patience, not doubt)
            self._turn_call, self._has_turn = -1, False
        core = self._connection.core
        if is_alive:
            self._connection.use(None, core)
            self._say_hello()
        elif core is None:
            self._connection.use(None, None)
        else:
            core.kill()  # it may be there, but is of no use
            self._connection.use(None, None)
            self._restart_core()
        self._arm_timers()

    def _restart_core(self) -> None:
        """Another embedded one, in which every request that was accepted fits."""
        info = self.info
        config = msgspec.structs.replace(
            self.config,
            num_gpu_blocks_override=info.num_blocks,
            max_model_len=info.max_model_len,
            max_model_len_is_explicit=True,
        )
        try:
            core = CoreProcess(config)
        except OSError as error:
            self._die(f"the engine is gone, and cannot be started again: {error}")
        else:
            self._connection.use(None, core)

    def _look_for_return(self) -> None:
        core = self._connection.core
        if core is None:
            return  # a retry is due
        try:
            if core.poll() is None:
                return
        except HeadraceError as error:
            self._lose(str(error))
        else:
            self._address = core.address
            self._say_hello()

    def _say_hello(self) -> None:
        """Connect anew. The core need not be there yet."""
        try:
            sock = ClientSocket(self._address, self._keys)
        except ConfigError as error:
            self._die(str(error))
            return
        sock.send(Hello(PROTOCOL_VERSION, client_name()))
        self._connection.use(sock, self._connection.core)
        self._drain_soon()

    def _resume(self, sock: ClientSocket, welcome: Welcome) -> None:
        """There is a core again."""
        outage, self._outage = self._outage, None
        if outage is None:
            logger.warning("the engine core said welcome twice")
            return
        if welcome.protocol != PROTOCOL_VERSION:
            self._die(f"the engine core has come back with protocol {welcome.protocol}")
            return
        for name in _SAME_TOKENS:
            was, now = getattr(self.config, name), getattr(welcome.config, name)
            if was != now:
                self._die(f"the engine core has come back as another one: {name} was {was!r}, is {now!r}")
                return
        if self.info.life != "" and welcome.info.life == self.info.life:
            self._requests.lose_connection()
            del self._losses[-1:]
        else:
            self._requests.lose_core(self.config.max_replays, beyond_doubt=outage.beyond_doubt)
            self._calls.lose_core(self.config.max_replays, outage.cause)
        self.info = welcome.info
        self.num_restarts += 1
        seconds = time.monotonic() - outage.began
        logger.warning("the engine core is back after %.1f s (pid %d)", seconds, self.info.pid)
        self._send_replays(sock)
        for call in self._calls.unanswered():
            sock.send(call)

    @property
    def _may_try(self) -> bool:
        """No other client can do so at the same time."""
        return self._connection.core is not None or self._has_turn

    def _send_replays(self, sock: ClientSocket) -> None:
        for message in self._requests.replays(may_try=self._may_try):
            sock.send(message)
        if self._connection.core is None and self._requests.has_suspects != (self._turn_call >= 0):
            self._ask_or_pass(sock)

    def _ask_or_pass(self, sock: ClientSocket) -> None:
        """Our turn to try suspects: ask for it, or let others have it."""
        number = self._calls.new_number()
        if self._turn_call < 0:
            sock.send(Call(number, "take_turn"))
            self._turn_call = number
        else:
            sock.send(Call(number, "pass_turn"))
            self._turn_call, self._has_turn = -1, False

    def _die(self, cause: str) -> None:
        self.dead_error = error = EngineDeadError(cause)
        self._outage = None
        self._calls.fail_all(cause)
        self._requests.fail_all(error)
        self._finalizer()

    def _raise_if_dead(self) -> None:
        if self._connection.is_inherited and self.dead_error is None:
            self.dead_error = EngineDeadError("the engine belongs to another process, which forked this one")
        if self.dead_error is not None:
            raise EngineDeadError(str(self.dead_error))

    # --- on the loop ----------------------------------------------------------------------------------

    def _drain_soon(self) -> None:
        if not self._drain_is_due and self._loop is not None:
            self._drain_is_due = True
            self._loop.call_soon(_call, weakref.WeakMethod(self.drain))

    def _arm_timers(self) -> None:
        """During an outage: look for the core now and then, and not for ever."""
        if self._outage is None or self._loop is None or self._loop.is_closed():
            return
        left = max(self._outage.deadline - time.monotonic(), 0.0)
        self._loop.call_later(left, _call, weakref.WeakMethod(self._expire))
        if self._connection.core is None:
            self._loop.call_later(_RETRY_SECONDS, _call, weakref.WeakMethod(self._retry))

    def _expire(self) -> None:
        outage = self._outage
        if outage is not None and time.monotonic() >= outage.deadline and self.dead_error is None:
            self._die(f"the engine core did not come back within {self._patience:g} s: {outage.cause}")

    def _replace_silent(self, core: CoreProcess) -> None:
        if core is self._connection.core and self._outage is None and self.dead_error is None:
            self._lose(_HUNG_UP)

    def _retry(self) -> None:
        if self._outage is not None and self._connection.socket is None and self.dead_error is None:
            self._say_hello()


def _call(reference: weakref.WeakMethod[Callable[..., None]], *arguments: object) -> None:
    """What a loop may hold of a client: nothing that keeps it alive."""
    method = reference()
    if method is not None:
        method(*arguments)
