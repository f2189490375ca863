"""Finds output that repeats itself: a pattern of tokens that has come several times in a row. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ..ipc.errors import RequestError
from .checks import integer

MAX_PATTERN = 1024
REPETITION_DETECTED = "repetition_detected"
"""The stop reason of a completion that repeats itself."""
_MAX_COUNT = 1 << 20


@dataclass(frozen=True)
class RepetitionDetectionParams:
    """End a request when the last tokens are one pattern, `min_count` times in a row.

    Patterns have `min_pattern_size` (0 is 1) to `max_pattern_size` tokens (0: nothing is looked for).
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Raises RequestError."""
        name = "repetition_detection"
        longest = integer(
            name, self.max_pattern_size, 0, MAX_PATTERN, f"given a max_pattern_size in [0, {MAX_PATTERN}]"
        )
        integer(
            name,
            self.min_pattern_size,
            0,
            longest,
            f"given a min_pattern_size in [0, max_pattern_size={longest}]",
        )
        count = integer(name, self.min_count, 0, _MAX_COUNT, f"given a min_count in [2, {_MAX_COUNT}]")
        if longest and count < 2:
            message = f"{name}: min_count must be at least 2, got {count}"
            raise RequestError(message, parameter=name, value=count, limit=">= 2")


class RepetitionDetector:
    """Watches one completion's tokens; each costs one comparison for every pattern size."""

    __slots__ = ("_lengths", "_needed", "_tokens", "_unchecked")

    def __init__(self, wanted: RepetitionDetectionParams, min_tokens: int) -> None:
        """Nothing ends before there are `min_tokens` tokens."""
        sizes = range(max(wanted.min_pattern_size, 1), wanted.max_pattern_size + 1)
        self._needed = {size: size * (wanted.min_count - 1) for size in sizes}
        self._lengths = dict.fromkeys(sizes, 0)
        """How many of the last tokens equal the token one pattern before."""
        self._tokens: list[int] = []
        self._unchecked = min_tokens

    def push(self, token: int) -> bool:
        """True when the token completes a repetition."""
        tokens, lengths, found = self._tokens, self._lengths, False
        count = len(tokens)
        for size, needed in self._needed.items():
            if count >= size and tokens[-size] == token:
                lengths[size] += 1
                found = found or lengths[size] >= needed
            else:
                lengths[size] = 0
        tokens.append(token)
        self._unchecked -= 1
        return found and self._unchecked <= 0
