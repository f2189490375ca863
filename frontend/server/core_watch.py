"""CoreWatch: whether an engine core that is our child still says something. No event loop, no requests.

A core sends every client a message at least once a second, from the loop that does its work. So a process
that only needs to know whether the core hangs is a client that asks for nothing and listens.
"""

from __future__ import annotations

import selectors
import time

from ...ipc.messages import PROTOCOL_VERSION, Hello, Refused
from ..core_process import CoreProcess
from ..handshake import client_name, connect

LOOK_SECONDS = 1.0


class CoreWatch:
    """Watches one core: call `look` whenever its descriptors are readable, and about once a second."""

    def __init__(self, core: CoreProcess, hang_seconds: float, selector: selectors.BaseSelector) -> None:
        """Connect to a core that serves. Raises ConfigError."""
        self._hang_seconds = hang_seconds
        self._selector = selector
        self._name = f"{client_name()}, supervisor"
        self._socket, _ = connect(core.address, self._name)
        self._silence = 0.0
        self._last_look = time.monotonic()
        for descriptor in self._socket.descriptors:
            selector.register(descriptor, selectors.EVENT_READ)

    def look(self) -> float | None:
        """Seconds of silence once that is too long; None while all is well."""
        now = time.monotonic()
        # While we were stopped ourselves, what the core has said could not be heard.
        self._silence += min(now - self._last_look, 2 * LOOK_SECONDS)
        self._last_look = now
        is_known = not self._socket.lost_connection()
        while (message := self._socket.recv()) is not None:
            self._silence = 0.0
            is_known = is_known and not isinstance(message, Refused)
        if not is_known:  # the core may have forgotten us, having found us gone for a while
            self._socket.send(Hello(PROTOCOL_VERSION, self._name))
        return self._silence if self._silence >= self._hang_seconds else None

    def close(self) -> None:
        for descriptor in self._socket.descriptors:
            self._selector.unregister(descriptor)
        self._socket.close()
