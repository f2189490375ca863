"""What the scheduler has done since its start."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from ..ipc.messages import STEP_TOKENS
from .request import Request


@dataclass(slots=True)
class Counters:
    """The counters of `Stats`, by the same names."""

    num_steps: int = 0
    num_preemptions: int = 0
    num_replays: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    step_tokens: int = 0
    steps_by_tokens: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))

    def count_step(self, num_tokens: int) -> None:
        """A step of so many tokens is planned."""
        self.num_steps += 1
        self.step_tokens += num_tokens
        self.steps_by_tokens[bisect_left(STEP_TOKENS, num_tokens)] += 1

    def count_start(self, request: Request, looked_up: bool) -> None:
        """A request has left the queue for the first time; its prefix was `looked_up` in the cache or not."""
        self.prompt_tokens += request.num_prompt_tokens
        if looked_up:
            self.prefix_cache_queries += request.num_prompt_tokens
            self.prefix_cache_hits += request.num_cached_tokens
