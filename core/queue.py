"""The waiting requests, and whose turn it is. No clock, no blocks: the scheduler asks, and says what it took.

Whose turn it is, from the outside in:
- Under the "priority" policy the most urgent level goes first. So that nothing starves, the request that has
  waited longest gets at least one of every `AGEING_SHARE` admissions once it is `AGEING_SECONDS` old.
- Within a level the clients take turns: next is the one for which fewest tokens have been scheduled.
- A client's own requests of one level go in the order of their arrival.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from .request import Phase, Request, Share

AGEING_SECONDS = 10.0
AGEING_SHARE = 8
_AGED = -(2**32)
"""More urgent than every priority."""


class WaitingQueue:
    """Requests in line, and the accounts of the clients that have any.

    Attributes:
        num_prompt_tokens: of all requests in line.
        version: changes whenever the queue does.
    """

    def __init__(self, by_priority: bool) -> None:
        self.num_prompt_tokens = 0
        self.version = 0
        self._by_priority = by_priority
        self._shares: dict[bytes, Share] = {}
        self._all: list[Request] = []  # by arrival
        self._lines: dict[int, dict[bytes, list[Request]]] = {}  # level, client: by arrival
        self._levels: list[int] = []  # sorted, those of `_lines`
        self._num_since_oldest = 0
        self._num_arrived = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        """By arrival."""
        return iter(self._all)

    # --- coming and going ---------------------------------------------------------------------------

    def enter(self, request: Request) -> None:
        """A new request: give it its place in the order and its client's account, and put it in line."""
        request.order = (request.priority if self._by_priority else 0, self._num_arrived)
        self._num_arrived += 1
        share = self._shares.get(request.client)
        if share is None:
            # Who comes back starts level with whoever has had least, not with a claim on the past.
            least = min((other.num_tokens for other in self._shares.values()), default=0)
            share = self._shares[request.client] = Share(least)
        share.num_requests += 1
        request.share = share
        self.push(request)

    def leave(self, request: Request) -> None:
        """A request has ended, wherever it was; its client's account ends with its last one."""
        request.share.num_requests -= 1
        if not request.share.num_requests:
            del self._shares[request.client]

    def push(self, request: Request) -> None:
        """Put it in line, where its arrival places it."""
        level = request.priority if self._by_priority else 0
        lines = self._lines.get(level)
        if lines is None:
            lines = self._lines[level] = {}
            insort(self._levels, level)
        insort(lines.setdefault(request.client, []), request, key=_arrival)
        insort(self._all, request, key=_arrival)
        self.num_prompt_tokens += request.num_prompt_tokens
        self.version += 1

    def remove(self, request: Request) -> None:
        """Take it out of the line."""
        level = request.priority if self._by_priority else 0
        lines = self._lines[level]
        line = lines[request.client]
        _delete(line, request)
        _delete(self._all, request)
        if not line:
            del lines[request.client]
            if not lines:
                del self._lines[level]
                del self._levels[bisect_left(self._levels, level)]
        self.num_prompt_tokens -= request.num_prompt_tokens
        self.version += 1

    # --- whose turn it is ---------------------------------------------------------------------------

    def next(self, now: float) -> Request | None:
        """Who is to be admitted next."""
        return self._all[0] if self._is_oldest_due(now) else self.most_urgent()

    def most_urgent(self) -> Request | None:
        """Who would be next if nobody had waited long."""
        if not self._levels:
            return None
        return min(self._lines[self._levels[0]].values(), key=_turn)[0]

    def next_preempted(self) -> Request | None:
        """The first in line of those that have run before."""
        return next((request for request in self._all if request.phase is Phase.PREEMPTED), None)

    def first_in_line(self, request: Request, count: int) -> list[Request]:
        """At most `count` requests from the head of this one's line: same level, same client."""
        level = request.priority if self._by_priority else 0
        return self._lines[level][request.client][:count]

    def take(self, request: Request, now: float) -> None:
        """It is admitted. One whose age gave it the turn is not displaced by others' urgency afterwards."""
        if request is self._all[0]:
            if self._is_oldest_due(now):
                request.order = (_AGED, request.order[1])
            self._num_since_oldest = 0
        else:
            self._num_since_oldest += 1
        self.remove(request)

    def _is_oldest_due(self, now: float) -> bool:
        return (
            self._by_priority
            and self._num_since_oldest >= AGEING_SHARE - 1
            and bool(self._all)
            and now - self._all[0].arrival_time >= AGEING_SECONDS
        )


def _arrival(request: Request) -> int:
    return request.order[1]


def _turn(line: list[Request]) -> tuple[int, int]:
    return line[0].share.num_tokens, line[0].order[1]


def _delete(line: list[Request], request: Request) -> None:
    index = bisect_left(line, request.order[1], key=_arrival)
    assert line[index] is request
    del line[index]
