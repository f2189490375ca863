"""What a new core is told of the requests that the old one took along. Pure.

All are sent again at once, each with the tokens that it has brought. Those that had brought none before that
core died, too, are then sent one after another: who is alone when a core dies is the cause, and ends. Where a
core has other clients, they wait for their turn: only one client at a time does so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from ..ipc.messages import AddRequest
from .requests import Completion

_SEEDS = 2**63
_SOON = 0.001
"""Seconds: a timeout that has passed while there was no core."""


class ReplayQueue:
    """The completions that the next core, or this one, is still to be told of."""

    def __init__(self) -> None:
        self._together: list[Completion] = []
        self._singly: deque[Completion] = deque()
        self._alone: Completion | None = None
        """Of those sent singly, the last."""

    @property
    def is_empty(self) -> bool:
        return not self._together and not self._singly

    def refill(
        self, completions: Iterable[Completion], max_replays: int, beyond_doubt: bool
    ) -> list[Completion]:
        """The core that knew these is gone. Returns those that are to end: cores died of them too often.

        `beyond_doubt`: nothing else that the core knew may have been the cause.
        """
        living = list(completions)
        again = [each for each in living if each.strikes and each.was_sent and not each.got_further]
        suspects = {*again, *self._singly}
        for each in living:
            if not each.was_sent:
                continue
            if each.got_further or not each.strikes:
                each.strikes = 1
            elif len(again) == 1 and beyond_doubt:
                each.strikes += 1
            each.mark_lost()
        guilty = [each for each in living if each.strikes > max_replays]
        if guilty:  # the cause is found
            suspects.clear()
        self._together = [each for each in living if each not in suspects]
        self._singly = deque(each for each in living if each in suspects)
        self._alone = None
        return guilty

    def send_again(self, completions: Iterable[Completion]) -> None:
        """The core that knew these has forgotten them, and lives: none is to blame."""
        suspects = {*self._singly, *([self._alone] if self._alone and self._is_trying else [])}
        living = list(completions)
        for each in living:
            if each.got_further:
                each.strikes = 0
            each.mark_lost()
        self._together = [each for each in living if each not in suspects]
        self._singly = deque(each for each in living if each in suspects)
        self._alone = None

    def hold(self, completion: Completion) -> None:
        """A new one, which came when there was no core."""
        self._together.append(completion)

    @property
    def has_suspects(self) -> bool:
        """Some are to be sent singly, or one that was is not cleared yet."""
        return bool(self._singly) or self._is_trying

    @property
    def _is_trying(self) -> bool:
        alone = self._alone
        return alone is not None and not alone.got_further and not alone.request.ended

    def due(self, *, may_try: bool) -> list[Completion]:
        """Those to be sent now. Look again whenever tokens have come. `may_try`: it is our turn."""
        due, self._together = self._together, []
        if self._singly and may_try and not self._is_trying:
            self._alone = self._singly.popleft()
            due.append(self._alone)
        return [each for each in due if each.finish_reason is None and not each.request.ended]


def replay(completion: Completion, now: float) -> AddRequest:
    """The message that makes a core go on where another one was."""
    request = completion.request
    message = request.message
    assert message is not None
    completion.mark_sent()
    sampling = message.sampling
    waited = now - request.sent_at
    return msgspec.structs.replace(
        message,
        request=completion.number,
        sampling=msgspec.structs.replace(sampling, seed=(sampling.seed + completion.index) % _SEEDS),
        n=1,
        generated=completion.generated.tobytes(),
        queue_timeout=None if request.has_started else _left(message.queue_timeout, waited),
        first_token_timeout=None if completion.generated else _left(message.first_token_timeout, waited),
        total_timeout=_left(message.total_timeout, waited),
    )


def _left(seconds: float | None, waited: float) -> float | None:
    return None if seconds is None else max(seconds - waited, _SOON)
