"""What the exit code of one of our processes says."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Other codes are Python's or the kernel's: 128 + n or -n for signal n."""

    DONE = 0
    """Ended as it was asked to, with nothing left to do."""
    FAULT = 1
    """A fault of the engine, a worker or the machine: starting again may help."""
    CONFIG = 2
    """It cannot run as it was asked to: starting it again the same way will not help."""
    CUT_OFF = 3
    """Ended as it was asked to, but with requests at work: a second signal, or the drain took too long."""
    PARENT_GONE = 70
    """The process that it belonged to vanished."""
