"""How far ranks have come, as the core reads it."""

from __future__ import annotations

import os

from headrace.ipc.odometer import Odometers, odometer


def test_each_rank_counts_for_itself_and_the_core_reads() -> None:
    odometers = Odometers(3)
    first, last = odometer(odometers.fd, 0), odometer(odometers.fd, 2)
    for advance in (first, last, last):
        advance()
    assert odometers.read() == [1, 0, 2]
    os.ftruncate(odometers.fd, 5)  # whoever does that harms nobody but itself
    assert odometers.read() == [1, 0, 0]
    odometers.close()
    odometers.close()
