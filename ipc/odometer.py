"""How far each rank has come: a counter for each, in memory that the core can read whatever a rank is doing.

Ranks that wait for one that hangs look as it does from outside, but it is behind them.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

_BYTES = 8


class Odometers:
    """The core's side. The memory has no name, and is gone with the last process that holds it."""

    def __init__(self, num_ranks: int) -> None:
        self.fd = os.memfd_create("odometers")
        """For the ranks."""
        self._size = _BYTES * num_ranks
        os.ftruncate(self.fd, self._size)

    def read(self) -> list[int]:
        """Of each rank. What they have not written counts as zero."""
        # Read, not mapped: memory that somebody has cut short ends the process that looks at it.
        data = os.pread(self.fd, self._size, 0).ljust(self._size, b"\0")
        return memoryview(data).cast("Q").tolist()

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def odometer(fd: int, rank: int) -> Callable[[], None]:
    """A rank's side: what to call whenever it has come a bit further. `fd`: that of `Odometers`."""
    counts = memoryview(mmap.mmap(fd, 0)).cast("Q")

    def advance() -> None:
        counts[rank] += 1

    return advance
