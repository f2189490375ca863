"""A step: its plan in the making, and what became of it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

from ..ipc.errors import ErrorInfo, HeadraceError
from ..ipc.messages import Admit, FinishReason, Logprobs
from .logprobs import MAX_ENTRIES, LogprobRow
from .request import Request


class Ended(NamedTuple):
    """A request that ended by itself."""

    request: Request
    reason: FinishReason
    stop_token_id: int | None
    error: ErrorInfo | None = None


class BadResultError(HeadraceError):
    """A worker's answer does not fit its plan; nothing of it was used."""


@dataclass(slots=True)
class Outputs:
    """What one step brought. `rows` is the same object as long as the same requests run."""

    rows: list[Request]
    """The requests that got a token; do not change it."""
    tokens: array[int]
    """int32[len(rows)]"""
    started: list[Request]
    """Left the queue for the first time."""
    ended: list[Ended]
    logprobs: dict[Request, LogprobRow] = field(default_factory=dict)
    """Of the rows that want them."""
    prompt_logprobs: list[tuple[Request, Logprobs]] = field(default_factory=list)


@dataclass(slots=True)
class Step:
    """A plan being made, and later in flight."""

    number: int
    budget: int
    """Tokens that may still be scheduled."""
    logprob_room: int = MAX_ENTRIES
    """Entries that prompts may still bring."""
    num_decodes: int = 0
    """Rows before the chunks'."""
    preempted: bool = False
    granted: array[int] = field(default_factory=lambda: array("i"))
    admitted: list[Admit] = field(default_factory=list)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    """Rows that compute prompt tokens, and how many."""
    sampling: list[Request] = field(default_factory=list)
    """Rows that sample, in order."""
    started: list[Request] = field(default_factory=list)
    last: list[Request] = field(default_factory=list)
    """Rows that sample their request's last token."""
