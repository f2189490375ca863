"""Whose turn it is to try what cores may have died of. No sockets, no clock.

When a core dies of a request, every client has requests that may have been the cause, and sends them to the
next core one by one. Were two clients to do that at the same time, each would blame its own. So a client asks
for the turn first, and has it until it passes it on, leaves, or has kept it for too long.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

MAX_SECONDS = 60.0
"""A client that is stopped must not hold up the others for ever."""


class Grant(NamedTuple):
    """A client's turn has come; `call` is how it asked."""

    client: bytes
    call: int


class Turns:
    """Every method returns the grant that is to be told now, if there is one."""

    def __init__(self) -> None:
        self._waiting: deque[Grant] = deque()
        """The first of them has the turn."""
        self._deadline = 0.0

    def ask(self, client: bytes, call: int, now: float) -> Grant | None:
        """A client that asks again goes to the end."""
        granted = self.leave(client, now)
        self._waiting.append(Grant(client, call))
        return granted or (self._begin(now) if len(self._waiting) == 1 else None)

    def leave(self, client: bytes, now: float) -> Grant | None:
        """The client no longer wants it, or is gone."""
        had_it = bool(self._waiting) and self._waiting[0].client == client
        self._waiting = deque(each for each in self._waiting if each.client != client)
        return self._begin(now) if had_it else None

    def expire(self, now: float) -> Grant | None:
        """To be called now and then."""
        if len(self._waiting) < 2 or now < self._deadline:
            return None
        self._waiting.popleft()
        return self._begin(now)

    def _begin(self, now: float) -> Grant | None:
        self._deadline = now + MAX_SECONDS
        return self._waiting[0] if self._waiting else None
