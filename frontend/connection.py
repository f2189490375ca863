"""Connection: what a client of a core has to give back, whoever drops it and whenever."""

from __future__ import annotations

import asyncio
import os
import weakref
from typing import Protocol

from ..ipc.sockets import ClientSocket
from .core_process import CoreProcess


class Drain(Protocol):
    """Takes in what has arrived."""

    def drain(self) -> None: ...


class Connection:
    """The socket to a core, its places in the event loop, and an embedded core's process.

    All of them may be exchanged for others when a core is lost. Holds its client weakly: a client that is
    dropped is collected, and its finalizer closes the connection.
    """

    def __init__(self, sock: ClientSocket, core: CoreProcess | None) -> None:
        self.core = core
        self.socket: ClientSocket | None = sock
        """None while there is nothing to connect to."""
        self.client: weakref.ref[Drain] | None = None
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    @property
    def is_inherited(self) -> bool:
        """This process was forked from the one that it belongs to."""
        return os.getpid() != self._pid

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch the descriptors in this loop, and in no other any more."""
        self._detach()
        self._loop = loop
        for descriptor in self._descriptors():
            loop.add_reader(descriptor, self._on_readable)

    def use(self, sock: ClientSocket | None, core: CoreProcess | None) -> None:
        """Go on with these; what they replace is closed and stopped."""
        loop, old_socket, old_core = self._loop, self.socket, self.core
        self._detach()
        if old_socket is not None and old_socket is not sock:
            old_socket.close()
        if old_core is not None and old_core is not core:
            old_core.stop()
        self.socket, self.core = sock, core
        if loop is not None and not loop.is_closed():
            self.attach(loop)

    def close(self) -> None:
        """Idempotent, from any thread; stops an embedded core."""
        if self._is_closed or self.is_inherited:
            return
        self._is_closed = True
        self._detach()
        if self.core is not None:
            self.core.stop()
        if self.socket is not None:
            self.socket.close()

    def _descriptors(self) -> list[int]:
        sockets = () if self.socket is None else self.socket.descriptors
        status = () if self.core is None else (self.core.status_fd,)
        return [*sockets, *status]

    def _detach(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            for descriptor in self._descriptors():
                loop.remove_reader(descriptor)

    def _on_readable(self) -> None:
        client = None if self.client is None else self.client()
        if client is not None:
            client.drain()
