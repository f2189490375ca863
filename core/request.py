"""One generation as the scheduler sees it: its tokens, its blocks and where it is in its life."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from ..ipc.messages import Sampling
from .block_pool import root_of


class Phase(Enum):
    """Where a request is in its life."""

    WAITING = auto()
    """In the queue for the first time."""
    RUNNING = auto()
    """Holds a slot and blocks."""
    PREEMPTED = auto()
    """Back in the queue, its blocks given to others; tokens of sent plans may still arrive."""
    DRAINING = auto()
    """Its last plan is sent: it holds nothing and waits for its last tokens."""
    FINISHED = auto()
    """Nobody waits for it; tokens that still arrive are dropped."""


_NEXT = {
    Phase.WAITING: {Phase.RUNNING, Phase.FINISHED},
    Phase.RUNNING: {Phase.PREEMPTED, Phase.DRAINING, Phase.FINISHED},
    Phase.PREEMPTED: {Phase.RUNNING, Phase.FINISHED},
    Phase.DRAINING: {Phase.PREEMPTED, Phase.FINISHED},  # back only if the workers crash
    Phase.FINISHED: set[Phase](),
}


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A request was being computed when the workers crashed."""

    until: int
    """Cleared when it has this many tokens."""
    strikes: int
    """Crashes that count against it."""
    alone: bool
    """It is to be the only suspect among those that run."""


@dataclass(slots=True, eq=False)
class Share:
    """A client's account, for as long as it has requests."""

    num_tokens: int
    """Scheduled for it: prompt tokens computed, and generated ones."""
    num_requests: int = 0


class Deadlines(NamedTuple):
    """When (time.monotonic) a request must have left the queue, have a token, have ended; None: never."""

    queue: float | None = None
    first_token: float | None = None
    total: float | None = None


NO_DEADLINES = Deadlines()


@dataclass(slots=True, eq=False)
class Request:
    """A request; the scheduler alone changes it after it was added."""

    client: bytes
    number: int
    """The client's own name for it."""
    tokens: array[int]
    """int32: the prompt and the generated tokens that the core knows."""
    sampling: Sampling
    max_tokens: int
    priority: int = 0
    arrival_time: float = 0.0
    """time.monotonic()"""
    num_prompt_tokens: int = 0
    """0: all of `tokens`."""
    deadlines: Deadlines = NO_DEADLINES
    cache_salt: str = ""
    stop_ids: frozenset[int] = frozenset()
    """The end-of-sequence and stop tokens; empty: those of `sampling`."""

    phase: Phase = Phase.WAITING
    order: tuple[int, int] = (0, 0)
    """(level, arrival number): backwards the order of preemption."""
    share: Share = field(default_factory=lambda: Share(0))
    num_charged_tokens: int = 0
    """Of `num_computed_tokens`, those that its share has been charged with or that it found in the cache."""
    num_passes: int = 0
    """How often others with longer cached prefixes went before it."""
    max_total_tokens: int = field(init=False)
    """Length with prompt at which it ends."""

    slot: int = -1
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    """Tokens whose KV is in the blocks once all sent plans have run."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache held at the first admission."""
    queued_seconds: float = 0.0
    """From its arrival to its first admission."""
    num_pending_tokens: int = 0
    """After a preemption: tokens that sent plans will still bring."""
    attention_at: int = 0
    """A decoding request needs no look until `num_computed_tokens` is this."""
    cache_root: bytes = field(init=False)
    """What the names of its blocks begin with."""
    block_hashes: list[bytes] = field(default_factory=list)
    suspicion: Suspicion | None = None
    """See `blame`."""
    slot_length: int = 0
    """Its tokens when it last took a slot."""
    num_named_blocks: int = 0
    """Leading blocks of the table that were offered to the prefix cache."""

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.tokens)
        self.max_total_tokens = self.num_prompt_tokens + self.max_tokens
        if not self.stop_ids:
            eos = self.sampling.eos_token_id
            self.stop_ids = frozenset(self.sampling.stop_token_ids + ([] if eos is None else [eos]))
        self.cache_root = root_of(self.cache_salt)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def has_brought(self) -> bool:
        """A token has come since it took its slot."""
        return len(self.tokens) > self.slot_length

    def misses(self, now: float) -> bool:
        """One of its deadlines has passed."""
        queue, first_token, total = self.deadlines
        return (
            (queue is not None and now >= queue and self.phase is Phase.WAITING)
            or (first_token is not None and now >= first_token and not self.num_output_tokens)
            or (total is not None and now >= total)
        )

    def move(self, phase: Phase) -> None:
        """Enter `phase`, which must be a legal successor."""
        assert phase in _NEXT[self.phase], f"{self.phase} -> {phase}"
        self.phase = phase
