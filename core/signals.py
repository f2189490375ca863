"""What the outside world tells the process by signals, for a loop to take when it is ready."""

from __future__ import annotations

import signal
import socket
from types import FrameType

from ..ipc.exit_codes import ExitCode

_END = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Catches SIGTERM, SIGINT and SIGHUP for the whole process.

    Until `defer` the first SIGTERM or SIGINT ends it at once, through the `finally` clauses, whatever it is
    waiting for. From then on the first is left to the loop, and the second ends it. SIGHUP always is the
    loop's.
    """

    def __init__(self) -> None:
        # A signal that comes just before a wait would not end it; its byte here does.
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._is_deferring = False
        self._num_ends = 0
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (*_END, signal.SIGHUP):
            signal.signal(number, self._note)

    def fileno(self) -> int:
        """Readable when there is something to take."""
        return self._reader.fileno()

    def defer(self) -> None:
        self._is_deferring = True

    def take(self) -> set[signal.Signals]:
        """Those that came since the last time. Never blocks."""
        try:
            return {signal.Signals(number) for number in self._reader.recv(4096)}
        except BlockingIOError:
            return set()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            return  # its byte is all that is needed
        self._num_ends += 1
        if not self._is_deferring or self._num_ends > 1:
            for other in _END:
                signal.signal(other, signal.SIG_IGN)
            raise SystemExit(ExitCode.CUT_OFF if self._is_deferring else ExitCode.DONE)
