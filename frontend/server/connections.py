"""Connections: uvicorn's HTTP protocol, with limits to their number and to how long a client may take."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_LOOKS = 8
"""Within the time that a client may leave its answer unread."""
_GOODBYE_SECONDS = 0.5
_RESERVED = 128
"""File descriptors for the engine: libzmq aborts the process when it finds none."""


def most_connections() -> int:
    """How many there may be at once, now that the process may have as many files as it ever may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return max(most - _RESERVED, most // 2)


class _Protocol(HttpToolsProtocol):
    head_seconds: float
    stall_seconds: float
    most_connections: int
    _due: asyncio.TimerHandle | None = None
    _next_look: asyncio.TimerHandle | None = None
    _unread = 0
    """Bytes that the client had left to read at the last look."""
    _looks_alike = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
            return
        self._arm()
        self._look_later()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arm()

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._next_look is not None:
            self._next_look.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            # TLS would wait half a minute for the client's goodbye.
            self.loop.call_later(_GOODBYE_SECONDS, self.transport.abort)

    def _arm(self) -> None:
        self._disarm()
        self._due = self.loop.call_later(self.head_seconds, self.transport.close)

    def _disarm(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _look_later(self) -> None:
        self._next_look = self.loop.call_later(self.stall_seconds / _LOOKS, self._look)

    def _look(self) -> None:
        """Does the client read? TCP's own timeout sees only hosts that have vanished, and no Unix sockets."""
        unread = self.transport.get_write_buffer_size()
        # While more is written, as many bytes do not mean that none were read.
        is_fixed = self.flow.write_paused or self.transport.is_closing()
        self._looks_alike = self._looks_alike + 1 if unread and is_fixed and unread == self._unread else 0
        self._unread = unread
        if self._looks_alike >= _LOOKS:
            self.transport.abort()
        else:
            self._look_later()


def protocol(head_seconds: float, stall_seconds: float) -> type[asyncio.Protocol]:
    """The class for uvicorn. A connection is closed whose client takes longer to say what it wants, and one
    whose client reads nothing for as long as `stall_seconds` of what is kept for it."""
    limits = {"head_seconds": head_seconds, "stall_seconds": stall_seconds}
    return type("Protocol", (_Protocol,), {**limits, "most_connections": most_connections()})
