"""What a daemon tells its supervisor: a line on a descriptor, systemd's notifications, or both.

Nobody need listen, and a supervisor that has gone away is no reason to end: nothing here raises OSError.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from ..ipc.payloads import Daemon


class Supervisor:
    """Reports where `daemon` says, if anywhere."""

    def __init__(self, daemon: Daemon) -> None:
        self._ready_fd = daemon.ready_fd
        self._address = daemon.notify_socket
        if self._address is not None and self._address.startswith("@"):
            self._address = "\0" + self._address[1:]

    def status(self, text: str) -> None:
        """A line for `systemctl status`."""
        self._notify(f"STATUS={text}")

    def ready(self, line: bytes, text: str) -> None:
        """The core serves; `line` goes to the descriptor, which is closed."""
        if self._ready_fd is not None:
            with suppress(OSError):
                os.write(self._ready_fd, line + b"\n")
            if self._ready_fd > 2:  # the standard ones must stay open
                os.close(self._ready_fd)
        self._notify(f"READY=1\nSTATUS={text}")

    def stopping(self, text: str) -> None:
        self._notify(f"STOPPING=1\nSTATUS={text}")

    def beat(self) -> None:
        """The loop turns: systemd's watchdog, if it is set, wants to hear so."""
        self._notify("WATCHDOG=1")

    def _notify(self, message: str) -> None:
        if self._address is None:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(message.encode(), self._address)
