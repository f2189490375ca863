"""Connections: uvicorn's HTTP protocol, with a limit to how long a request's head may take."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class _Protocol(HttpToolsProtocol):
    head_seconds: float
    _due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arm()

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._disarm()
        self._due = self.loop.call_later(self.head_seconds, self.transport.close)

    def _disarm(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None


def protocol(head_seconds: float) -> type[asyncio.Protocol]:
    """The class for uvicorn: a connection whose client takes longer to say what it wants is closed."""
    return type("Protocol", (_Protocol,), {"head_seconds": head_seconds})
