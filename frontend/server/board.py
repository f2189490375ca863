"""The board on which servers that share a port write what they have counted, so that any can tell the sum.

One anonymous file in memory for each place; a server writes its own and reads them all. What a dead server
has counted stays, and its successor goes on from there: no counter ever falls.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Sequence

import msgspec

from ..metrics import AnyMetric, Counter, Gauge, Histogram

_HEAD = 8
"""Bytes of length and checksum in front of the records."""
_ATTEMPTS = 100


def make_place() -> int:
    """A descriptor to be inherited by the servers."""
    return os.memfd_create("headrace-metrics")


class Board:
    """`own` is this server's place among `places`, all of them descriptors."""

    def __init__(self, places: Sequence[int], own: int) -> None:
        self._places = list(places)
        self._own = own
        self._last: dict[int, list[AnyMetric]] = {place: _read(place) or [] for place in places}
        self._inherited = self._last[own]

    def write(self, records: Iterable[AnyMetric]) -> None:
        """Let the others see what has been counted here."""
        data = msgspec.msgpack.encode(merged([self._inherited, records]))
        head = len(data).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little")
        os.pwrite(self._own, head + data, 0)

    def total(self, records: Iterable[AnyMetric]) -> list[AnyMetric]:
        """What all have counted: `records` here, elsewhere what was last written."""
        for place in self._places:
            if place != self._own:
                self._last[place] = _read(place) or self._last[place]
        others = [self._last[place] for place in self._places if place != self._own]
        return merged([self._inherited, records, *others])


def merged(parts: Iterable[Iterable[AnyMetric]]) -> list[AnyMetric]:
    """Records of the same name and labels added up."""
    found: dict[tuple[str, str], AnyMetric] = {}
    for part in parts:
        for record in part:
            key = (record.name, repr(record.labels))
            found[key] = _sum(found[key], record) if key in found else record
    return list(found.values())


def _sum(one: AnyMetric, other: AnyMetric) -> AnyMetric:
    match one, other:
        case Counter(), Counter():
            return msgspec.structs.replace(one, value=one.value + other.value)
        case Gauge(), Gauge():
            return msgspec.structs.replace(one, value=one.value + other.value)
        case Histogram(), Histogram():
            buckets = {bound: count + other.buckets[bound] for bound, count in one.buckets.items()}
            total = one.sum + other.sum
            return msgspec.structs.replace(one, count=one.count + other.count, sum=total, buckets=buckets)
    raise TypeError(f"{one.name} is of two kinds")


def _read(place: int) -> list[AnyMetric] | None:
    """What is written there; None when nothing is, or a dead server left it half written."""
    for _ in range(_ATTEMPTS):  # its owner may be writing
        head = os.pread(place, _HEAD, 0)
        if len(head) < _HEAD:
            return None
        data = os.pread(place, int.from_bytes(head[:4], "little"), _HEAD)
        if zlib.crc32(data) == int.from_bytes(head[4:], "little"):
            return msgspec.msgpack.decode(data, type=list[AnyMetric])
    return None
