"""When requests with timeouts must have left the queue, have a token, have ended."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from .request import Phase, Request


class DeadlineQueue:
    """The deadlines of all requests that have any, soonest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._num_entries = 0  # ever made: no two compare equal
        self._num_dead = 0  # about as many entries of ended requests

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def soonest(self) -> float | None:
        """When to look again (time.monotonic), at the latest."""
        return self._heap[0][0] if self._heap else None

    def add(self, request: Request) -> None:
        for deadline in request.deadlines:
            if deadline is not None:
                heappush(self._heap, (deadline, self._num_entries, request))
                self._num_entries += 1

    def forget(self, request: Request) -> None:
        """It has ended. Its entries go when their time comes, or when they are too many."""
        self._num_dead += sum(deadline is not None for deadline in request.deadlines)
        if self._num_dead > 64 and 2 * self._num_dead > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].phase is not Phase.FINISHED]
            heapify(self._heap)
            self._num_dead = 0

    def pop_missed(self, now: float) -> list[Request]:
        """The requests that have missed one of theirs."""
        missed: dict[Request, None] = {}  # a set that keeps the order: thousands may miss theirs at once
        while self._heap and self._heap[0][0] <= now:
            request = heappop(self._heap)[2]
            if request.phase is Phase.FINISHED:
                self._num_dead = max(0, self._num_dead - 1)
            elif request.misses(now):
                missed[request] = None
        return list(missed)
