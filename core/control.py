"""What clients ask of the engine beside requests: pauses, sleep, the workers' own state. No I/O, no clock.

Each call is a generator that yields what it waits for. They take turns: one is at work, the others wait.
`advance` goes on with that one as far as it can; whoever owns the pipes sends the commands that come out of
it, and brings the answers back.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from ..ipc.errors import ErrorInfo, HeadraceError, OverloadedError, RequestError
from ..ipc.messages import Argument, Call, CallMethod, Command, CommandResult, Reply, RpcMethod
from .scheduler import Pause, Scheduler

MAX_WAITING = 64
"""Calls that wait for their turn."""
_PREFIX = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_MEMORY = frozenset({"weights", "kv_cache"})

Results: TypeAlias = list[dict[str, Argument]]
Work: TypeAlias = Generator[Callable[[], bool], None, Results]
"""Yields conditions, and goes on when the last one holds. Returns what the ranks say, if they were asked."""
Mode: TypeAlias = Literal["abort", "wait", "keep"]
Tag: TypeAlias = Literal["weights", "kv_cache", "scheduling"]


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of the calls' arguments."""


class _None(_Arguments, frozen=True):
    pass


class _Pause(_Arguments, frozen=True):
    mode: Mode = "abort"
    clear_cache: bool = True


class _Reset(_Arguments, frozen=True):
    reset_running_requests: bool = False


class _Sleep(_Arguments, frozen=True):
    level: Literal[0, 1, 2] = 1
    mode: Mode = "abort"


class _WakeUp(_Arguments, frozen=True):
    tags: list[Tag] | None = None


class _Rpc(_Arguments, frozen=True):
    method: RpcMethod


class _Profile(_Arguments, frozen=True):
    prefix: str = ""


class _NotDone(Exception):
    """What was asked could not be done, and that is a proper answer."""


class _Turn(NamedTuple):
    client: bytes
    call: int
    work: Work


class Control:
    """The state of the engine that calls change: whether it is paused, and what of it sleeps."""

    def __init__(
        self,
        scheduler: Scheduler,
        num_ranks: int,
        can_ask: Callable[[], bool],
        abort_all: Callable[[], None],
    ) -> None:
        """`can_ask`: the workers take commands. `abort_all` ends every request, and tells its client."""
        self._scheduler = scheduler
        self._num_ranks = num_ranks
        self._can_ask = can_ask
        self._abort_all = abort_all
        self._asleep: set[str] = set()
        self._level = 0
        self._holder: bytes | None = None
        """The client that has paused it."""
        self._turns: deque[_Turn] = deque()
        self._condition: Callable[[], bool] | None = None
        """What the first of `_turns` waits for; None: it has not begun."""
        self._commands: list[Command] = []
        self._num_commands = 0
        self._answers: dict[int, CommandResult] = {}
        self._is_lost = False
        """The workers went down before they had answered."""

    @property
    def is_paused(self) -> bool:
        return self._scheduler.paused is not Pause.NOTHING

    @property
    def sleep_level(self) -> int | None:
        """None: awake; 1, 2: the weights are on the host, or nowhere; 0: it only takes no work."""
        if not self._asleep:
            return None
        return self._level if "weights" in self._asleep else 0

    # --- calls in, replies out ----------------------------------------------------------------------

    def call(self, client: bytes, call: Call) -> None:
        """Take in a call, to be answered by `advance`. Raises RequestError."""
        if call.method not in _WORK:
            limit = ", ".join(CallMethod.__args__)  # type: ignore[attr-defined] # a Literal's choices
            message = f"there is no method {call.method!r:.100}; there are {limit}"
            raise RequestError(message, parameter="method", value=f"{call.method:.100}", limit=limit)
        if len(self._turns) >= MAX_WAITING:
            message = f"{MAX_WAITING} calls wait for their turn already"
            raise OverloadedError(message, retry_after=1.0, limit=MAX_WAITING)
        kind, work = _WORK[call.method]
        try:
            arguments = msgspec.convert(call.arguments, kind)
        except msgspec.ValidationError as error:
            message = f"{call.method}: {error}"
            raise RequestError(message, parameter="arguments", value=f"{call.arguments!s:.100}") from None
        self._turns.append(_Turn(client, call.call, work(self, arguments)))

    def client_vanished(self, client: bytes) -> bool:
        """A dead client must not hold up the others: a pause of its own is to end, and what it has asked and
        nobody has begun is not done. True when there is any of it.

        Memory that was given up stays so, for it may be in use: to take it back is for someone who knows.
        """
        at_work = self._turns[0] if self._condition is not None else None
        asked = [turn for turn in self._turns if turn.client == client]
        self._turns = deque(turn for turn in self._turns if turn is at_work or turn.client != client)
        if client == self._holder:
            self._turns.append(_Turn(client, 0, self._lift(client)))
        return client == self._holder or bool(asked)

    def advance(self) -> list[tuple[bytes, Reply]]:
        """Go on with what was asked; returns the replies that are due."""
        replies: list[tuple[bytes, Reply]] = []
        while self._turns and (self._condition is None or self._condition()):
            client, call, work = self._turns[0]
            try:
                self._condition = next(work)
                continue
            except StopIteration as end:
                reply = Reply(call, results=end.value)
            except _NotDone:
                reply = Reply(call, ok=False)
            except HeadraceError as error:
                reply = Reply(call, ok=False, error=ErrorInfo.of(error))
            self._turns.popleft()
            self._condition = None
            replies.append((client, reply))
        return replies

    # --- commands out, answers in -------------------------------------------------------------------

    def take_commands(self) -> list[Command]:
        """What to send to every rank now."""
        commands, self._commands = self._commands, []
        return commands

    def hear(self, result: CommandResult) -> None:
        """A rank has answered."""
        if result.number == self._num_commands:
            self._answers[result.rank] = result

    def workers_lost(self) -> None:
        """They start again, wide awake; what they were asked is not answered."""
        self._is_lost = True
        self._commands.clear()
        self._asleep -= _MEMORY

    def _ask(self, name: Any, **arguments: Argument) -> Work:
        """Have every rank do something; returns the results in the order of the ranks."""
        yield self._can_ask
        self._num_commands += 1
        self._answers.clear()
        self._is_lost = False
        self._commands.append(Command(self._num_commands, name, arguments))
        yield lambda: self._is_lost or len(self._answers) == self._num_ranks
        if self._is_lost:
            raise RequestError(f"the workers failed during {name}, and were started again")
        answers = [self._answers[rank] for rank in sorted(self._answers)]
        for answer in answers:
            if answer.error is not None:
                raise answer.error.exception()
        return [answer.result for answer in answers]

    # --- the calls ----------------------------------------------------------------------------------

    def _hold(self, mode: Mode) -> Work:
        """Let nothing run: what runs is ended, waited for, or kept as it is."""
        scheduler = self._scheduler
        self._holder = self._turns[0].client
        if mode == "wait" and not self._asleep & _MEMORY:
            scheduler.paused = Pause.NEW
            yield lambda: not scheduler.has_started_requests
        scheduler.paused = Pause.EVERYTHING
        if mode == "abort":
            self._abort_all()
        yield lambda: not scheduler.num_in_flight
        return []

    def _pause(self, wanted: _Pause) -> Work:
        yield from self._hold(wanted.mode)
        if wanted.clear_cache:
            self._scheduler.reset_prefix_cache(reset_running=True)
        return []

    def _resume(self, _: _None) -> Work:
        yield _now
        self._refuse_asleep("resume_generation")
        self._go_on()
        return []

    def _lift(self, client: bytes) -> Work:
        yield _now
        if client == self._holder and not self._asleep & _MEMORY:
            self._go_on()
        return []

    def _go_on(self) -> None:
        self._asleep.clear()
        self._holder = None
        self._scheduler.paused = Pause.NOTHING

    def _reset(self, wanted: _Reset) -> Work:
        yield _now
        if not self._scheduler.reset_prefix_cache(wanted.reset_running_requests):
            raise _NotDone
        return []

    def _sleep(self, wanted: _Sleep) -> Work:
        if self._asleep & _MEMORY:
            return []
        yield from self._hold(wanted.mode)
        self._asleep.add("scheduling")
        if wanted.level:
            self._scheduler.forget_cache()
            yield from self._ask("sleep", level=wanted.level)
            self._asleep |= _MEMORY
            self._level = wanted.level
        return []

    def _wake_up(self, wanted: _WakeUp) -> Work:
        tags = _MEMORY | {"scheduling"} if wanted.tags is None else frozenset(wanted.tags)
        waking = self._asleep & tags
        if "kv_cache" in waking and "weights" in self._asleep - waking:
            message = "the weights have to be awake before the KV cache"
            raise RequestError(message, parameter="tags", value=sorted(tags), limit="weights first")
        if waking & _MEMORY:
            yield from self._ask("wake_up", tags=sorted(waking & _MEMORY))
            self._asleep -= waking & _MEMORY
        # The KV cache is what is woken last; the workers may have died asleep, and have it already.
        if self._asleep == {"scheduling"} and not tags.isdisjoint({"scheduling", "kv_cache"}):
            self._go_on()
        return []

    def _rpc(self, wanted: _Rpc) -> Work:
        return (yield from self._ask(wanted.method))

    def _start_profile(self, wanted: _Profile) -> Work:
        if wanted.prefix and not _PREFIX.fullmatch(wanted.prefix):
            limit = "at most 64 letters, digits, '_', '-' and '.', not beginning with '.'"
            message = f"profile_prefix must be {limit}, got {wanted.prefix!r:.100}"
            raise RequestError(
                message, parameter="profile_prefix", value=f"{wanted.prefix:.100}", limit=limit
            )
        return (yield from self._ask("start_profile", prefix=wanted.prefix))

    def _stop_profile(self, _: _None) -> Work:
        return (yield from self._ask("stop_profile"))

    def _refuse_asleep(self, method: str) -> None:
        if self._asleep & _MEMORY:
            message = f"{method}: the engine sleeps ({', '.join(sorted(self._asleep))}); wake_up first"
            raise RequestError(message, parameter="method", value=method, limit="wake_up")


def _now() -> bool:
    return True


_WORK: dict[str, tuple[type[_Arguments], Callable[..., Work]]] = {
    "collective_rpc": (_Rpc, Control._rpc),
    "pause_generation": (_Pause, Control._pause),
    "reset_prefix_cache": (_Reset, Control._reset),
    "resume_generation": (_None, Control._resume),
    "sleep": (_Sleep, Control._sleep),
    "start_profile": (_Profile, Control._start_profile),
    "stop_profile": (_None, Control._stop_profile),
    "wake_up": (_WakeUp, Control._wake_up),
}
"""Method to its arguments and its generator."""
