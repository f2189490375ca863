"""Who of those that wait runs next, and who must make room for it. Decides only; the scheduler does it.

Admission is strict: when the one whose turn it is does not fit, all behind it wait. One exception serves the
prefix cache: what is about to be pushed out of it is used before.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ipc.config import EngineConfig
from .blame import Blame
from .displacement import choose_victims
from .queue import WaitingQueue
from .request import Request
from .slot_pool import SlotPool

PREFIX_WINDOW = 8
"""How far behind the head a longer cached prefix is looked for, and how often a head lets one pass."""


class Admission:
    """Chooses from `queue` who fits into `slots` and shares no blame; keeps only notes of who did not."""

    def __init__(self, config: EngineConfig, queue: WaitingQueue, slots: SlotPool, blame: Blame) -> None:
        self._queue = queue
        self._slots = slots
        self._blame = blame
        self._block_size = config.block_size
        self._budget = config.max_num_batched_tokens
        self._chunked = config.enable_chunked_prefill
        # Who could not be admitted, and whom displacing others would not help, until something changes.
        self._stuck: tuple[Request, int, int] | None = None
        self._immovable: tuple[Request, int] | None = None

    def head(self, now: float, *, only_preempted: bool) -> Request | None:
        """Whose turn it is; `only_preempted`: of those that have run before."""
        suspect = self._blame.next_waiting()
        if suspect is not None:
            return suspect
        return self._queue.next_preempted() if only_preempted else self._queue.next(now)

    def choose(
        self, head: Request, budget: int, num_running: int, *, only_preempted: bool
    ) -> tuple[Request, list[int]] | None:
        """The head or, when cached prefixes are at stake, one behind it with a longer one; None: it waits.

        With it come the blocks that hold its beginning. There is room for it beside `num_running` requests:
        blocks for all its tokens, so that two prompts under way never wait for each other's, and one for each
        running request, so that an admission is not undone by the next steps' growth.
        """
        attempt = head, self._slots.num_moves, self._queue.version
        if attempt == self._stuck or not self._may_run(head):
            return None
        found = self._slots.cache.find(head)
        if not only_preempted:
            rival, its_found = self._longest_prefix(head, found)
            if rival is not head and self._slots.has_room(rival, its_found, num_running):
                head.num_passes += 1
                return rival, its_found
        computes = len(head.tokens) - len(found) * self._block_size
        if computes > budget and not self._may_chunk(computes):
            return None
        if self._slots.has_room(head, found, num_running):
            return head, found
        self._stuck = attempt
        return None

    def most_urgent(self) -> Request | None:
        """The most urgent in line, if displacing others might help it."""
        urgent = self._queue.most_urgent()
        if urgent is None or not self._may_run(urgent) or (urgent, self._slots.num_moves) == self._immovable:
            return None
        return urgent

    def victims(self, urgent: Request, running: Sequence[Request]) -> list[Request]:
        """Who of the running must make room for it: as few as possible, and none in vain."""
        found = self._slots.cache.find(urgent)
        computes = len(urgent.tokens) - len(found) * self._block_size
        victims = choose_victims(
            urgent,
            running,
            self._slots.blocks,
            found,
            block_size=self._block_size,
            num_free_slots=self._slots.num_free,
            num_row_tokens=1 if self._may_chunk(computes) else computes,
            budget=self._budget,
        )
        if not victims:
            self._immovable = urgent, self._slots.num_moves
        return victims

    def _longest_prefix(self, head: Request, found: list[int]) -> tuple[Request, list[int]]:
        """Of the first few in the head's line, the one with most blocks in the cache, and these.

        Only when admitting the head would push cached blocks out: otherwise everybody's will still be there.
        """
        best = head, found
        own = -(-len(head.tokens) // self._block_size) - len(found)
        if own <= self._slots.blocks.num_unnamed or head.num_passes == PREFIX_WINDOW or not self._chunked:
            return best
        for request in self._queue.first_in_line(head, PREFIX_WINDOW):
            if request is not head and self._may_run(request):
                others = self._slots.cache.find(request)
                if len(others) > len(best[1]):
                    best = request, others
        return best

    def _may_run(self, request: Request) -> bool:
        """Its tokens are all known, and nobody runs who would share the blame for a crash with it."""
        return not request.num_pending_tokens and self._blame.may_run(request)

    def _may_chunk(self, num_tokens: int) -> bool:
        """A preempted request may have outgrown the budget: that one is chunked whatever the setting."""
        return self._chunked or num_tokens > self._budget
