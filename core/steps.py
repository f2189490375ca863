"""A step: its plan in the making, and what became of it."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np

from ..ipc.errors import ErrorInfo, HeadraceError
from ..ipc.messages import Admit, FinishReason, Logprobs, StepResult, pack, unpack
from .logprobs import MAX_ENTRIES, LogprobRow, check_rows
from .request import Phase, Request


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


class PlanColumns:
    """A plan's `slots` and `num_tokens`: left out when the workers know them from the plan before."""

    def __init__(self) -> None:
        self._decoding: list[Request] | None = None
        self._slots = b""

    def of(
        self, decoding: list[Request], chunks: list[tuple[Request, int]]
    ) -> tuple[bytes | None, bytes | None]:
        """`decoding` is the same object as long as the same requests decode."""
        if decoding is self._decoding and not chunks:
            return None, None
        rows = [*decoding, *(request for request, _ in chunks)]
        counts = [1] * len(decoding) + [count for _, count in chunks]
        slots = pack([request.slot for request in rows])
        self._decoding = None if chunks else decoding
        if slots == self._slots and sum(counts) == len(rows):
            return None, None
        self._slots = slots
        return slots, pack(counts)


def check_result(step: Step | None, result: StepResult, vocab_size: int) -> None:
    """Raise BadResultError when this cannot be the answer to that step's plan; None: no plan is in flight."""
    if step is None or step.number != result.step or len(result.tokens) != 4 * len(step.sampling):
        expected = "none" if step is None else f"{step.number} with {len(step.sampling)} tokens"
        got = f"{result.step} with {len(result.tokens) / 4:g}"
        raise BadResultError(f"the answer to step {got}; expected {expected}")
    # As unsigned numbers negative ones are large.
    if result.tokens and int(np.frombuffer(result.tokens, np.uint32).max()) >= vocab_size:
        raise BadResultError(f"the answer to step {result.step} has tokens out of the vocabulary")
    if any(not 0 <= failed.row < len(step.sampling) for failed in result.failed):
        raise BadResultError(f"the answer to step {result.step} names rows that it has not")
    chunks = range(step.num_decodes, step.num_decodes + len(step.chunks))
    try:
        check_rows(result, range(len(step.sampling)), chunks)
    except ValueError as error:
        raise BadResultError(f"the answer to step {result.step} has {error}") from None


def take_prompt_logprobs(step: Step, result: StepResult) -> list[tuple[Request, Logprobs]]:
    """Whose they are; who has all of them is not to be asked again."""
    found: list[tuple[Request, Logprobs]] = []
    for prompt in result.prompt_logprobs:
        request, _ = step.chunks[prompt.request - step.num_decodes]
        if unpack(prompt.logprobs.rows)[-1] == request.num_prompt_tokens - 1:
            # That was all: should it run again, the prefix cache serves it.
            request.sampling = msgspec.structs.replace(request.sampling, prompt_logprobs=None)
        if request.phase is not Phase.FINISHED:
            found.append((request, prompt.logprobs))
    return found
