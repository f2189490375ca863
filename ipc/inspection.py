"""Looking at a process that does not answer: what the kernel says of it, and its stacks.

Every child of ours prints the stacks of all its threads to standard error on SIGUSR1 (`ipc.process`), even
from the middle of a computation; a stopped one does so as soon as it continues.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

STACKS_SIGNAL = signal.SIGUSR1
STOPPED = "Tt"
_PER_SECOND = os.sysconf("SC_CLK_TCK")
_STATES = {
    "R": "running",
    "S": "asleep",
    "D": "waiting for a disk or a driver",
    "T": "stopped",
    "t": "stopped by a debugger",
    "Z": "dead",
}
_WRITING_SECONDS = 0.3
"""What a process takes to print its stacks where others want the CPU too; it may be killed after that."""


class Activity(NamedTuple):
    """A process at one moment."""

    state: str
    """One letter, as in proc(5)."""
    cpu_seconds: float
    """Of all its threads, since its start."""

    def __str__(self) -> str:
        return f"{_STATES.get(self.state, self.state)}, {self.cpu_seconds:.2f} s of CPU time"


def activity(pid: int) -> Activity:
    """A process that is gone counts as dead."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return Activity("Z", 0.0)
    return Activity(words[0], (int(words[11]) + int(words[12])) / _PER_SECOND)


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, as far as they can be seen."""
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in task.joinpath("children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def print_stacks(pid: int) -> None:
    """Make a child of ours (or a child's child) print its stacks now; a stopped one continues for it."""
    with suppress(ProcessLookupError):
        os.kill(pid, STACKS_SIGNAL)
        os.kill(pid, signal.SIGCONT)
        time.sleep(_WRITING_SECONDS)  # so that what several of them print does not mix
