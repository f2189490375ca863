"""Whether our children still do their work, and not just exist. No event loop, no requests.

A core sends every client a message at least once a second, from the loop that does its work: who only needs
to know whether it hangs is a client that asks for nothing and listens. A server writes to the `Board` as
often, from the loop that answers its clients.
"""

from __future__ import annotations

import os
import selectors
import time

from ...ipc.messages import PROTOCOL_VERSION, Hello, Refused
from ..core_process import CoreProcess
from ..handshake import client_name, connect

LOOK_SECONDS = 1.0
"""How often to `look` at least."""


class _Silence:
    """How long a child has given no sign of life."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._seconds = 0.0
        self._last_look = time.monotonic()

    def look(self, *, is_broken: bool) -> float | None:
        """Its seconds when they are too many; then they are counted anew."""
        now = time.monotonic()
        # While we were stopped ourselves, nothing could be heard.
        elapsed = min(now - self._last_look, 2 * LOOK_SECONDS)
        self._last_look = now
        self._seconds = 0.0 if is_broken else self._seconds + elapsed
        if self._seconds < self._limit:
            return None
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class CoreWatch:
    """Watches a core that serves; `look` also whenever its descriptors are readable."""

    def __init__(self, core: CoreProcess, hang_seconds: float, selector: selectors.BaseSelector) -> None:
        """Connect to it. Raises ConfigError."""
        self._selector = selector
        self._name = f"{client_name()}, supervisor"
        self._socket, _ = connect(core.address, self._name)
        self._silence = _Silence(hang_seconds)
        for descriptor in self._socket.descriptors:
            selector.register(descriptor, selectors.EVENT_READ)

    def look(self) -> float | None:
        """Seconds of silence once that is too long; None while all is well."""
        is_known, has_spoken = not self._socket.lost_connection(), False
        while (message := self._socket.recv()) is not None:
            has_spoken = True
            is_known = is_known and not isinstance(message, Refused)
        if not is_known:  # the core may have forgotten us, having found us gone for a while
            self._socket.send(Hello(PROTOCOL_VERSION, self._name))
        return self._silence.look(is_broken=has_spoken)

    def close(self) -> None:
        for descriptor in self._socket.descriptors:
            self._selector.unregister(descriptor)
        self._socket.close()


class ServerWatch:
    """Watches a server by its place on the board, from the first time that it writes there."""

    def __init__(self, place: int, hang_seconds: float) -> None:
        self._place = place
        self._written = self._last_written()
        self.has_begun = False
        """It has been seen to serve."""
        self._silence = _Silence(hang_seconds)

    def look(self) -> float | None:
        """Seconds of silence once that is too long; None while all is well."""
        before, self._written = self._written, self._last_written()
        has_written = self._written != before
        self.has_begun = self.has_begun or has_written
        return self._silence.look(is_broken=has_written or not self.has_begun)

    def _last_written(self) -> int:
        return os.fstat(self._place).st_mtime_ns
