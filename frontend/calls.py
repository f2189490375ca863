"""Calls: what a client has asked its core and waits for, over however many cores that takes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ..ipc.errors import EngineDeadError, RequestCrashedError
from ..ipc.messages import Argument, Call, CallMethod, Reply


@dataclass
class PendingCall:
    message: Call
    reply: asyncio.Future[Reply]
    num_losses: int = 0
    """Cores that were lost before they had answered it."""


class PendingCalls:
    """By their numbers. A core that comes back is asked again."""

    def __init__(self) -> None:
        self._calls: dict[int, PendingCall] = {}
        self._next_number = 0

    def new_number(self) -> int:
        number = self._next_number
        self._next_number = (number + 1) % 2**31
        return number

    def begin(self, method: CallMethod, arguments: dict[str, Argument]) -> PendingCall:
        """On the running loop."""
        message = Call(self.new_number(), method, arguments)
        call = PendingCall(message, asyncio.get_running_loop().create_future())
        self._calls[message.call] = call
        return call

    def end(self, call: PendingCall) -> None:
        """Nobody waits for it any more."""
        self._calls.pop(call.message.call, None)

    def answer(self, reply: Reply) -> None:
        call = self._calls.get(reply.call)
        if call is not None and not call.reply.done():
            call.reply.set_result(reply)

    def forget_all(self) -> None:
        """Whoever waited for them is gone with his event loop."""
        self._calls.clear()

    def unanswered(self) -> list[Call]:
        """What a new core is to be asked."""
        return [call.message for call in self._calls.values() if not call.reply.done()]

    @property
    def have_lost_cores(self) -> bool:
        """A core may have died of one of them."""
        return any(call.num_losses for call in self._calls.values())

    def lose_core(self, max_replays: int, cause: str) -> None:
        """Fail those that are asked again and again while one core after the other is lost."""
        for call in self._calls.values():
            call.num_losses += 1
            if call.num_losses > max_replays and not call.reply.done():
                message = f"{call.num_losses} engine cores were lost before they had answered: {cause}"
                error = RequestCrashedError(message, parameter="method", value=call.message.method)
                call.reply.set_exception(error)

    def fail_all(self, cause: str) -> None:
        """There will be no core any more."""
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.reply.done() and not call.reply.get_loop().is_closed():
                call.reply.set_exception(EngineDeadError(cause))
