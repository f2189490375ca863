"""Rules that need the host: what a request's next token may be, given those that it has generated.

A slot's rules are built when it is admitted and fed every generated token, so that a preemption or a replay
finds them where they were. They live here and not in the slot tables, because a GPU's table does not know the
tokens: the host hears them a step late, and only here must it wait for them. Knows no tensors.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ipc.config import EngineConfig
from ..ipc.errors import ErrorInfo, RequestError
from ..ipc.messages import Admit, FailedRow, Sampling
from .grammar import Grammar, Grammars
from .rules import BadWords, Fixed, Thinking, TokenRules

LOGGER = logging.getLogger(__name__)

Mask: TypeAlias = NDArray[np.int32]
"""int32 [ceil(vocab / 32)]: bit i of word j is token 32 * j + i; set is allowed."""
Tokens: TypeAlias = NDArray[np.int32]


class Constraint(Protocol):
    """A rule on one request's next token. Whatever it raises ends this request and no other."""

    def accept(self, token: int) -> None:
        """A token was appended. Tokens may still come when the rule has nothing more to allow."""

    def fill(self, mask: Mask) -> bool:
        """Clear the bits of what may not come next. False: all may, and `mask` is as it was."""


Rules: TypeAlias = Sequence[Constraint | Grammar]
"""Of one request; a grammar comes first."""
Build: TypeAlias = Callable[[Sampling, Tokens], Rules]
"""From parameters and prompt to the rules of a request that has generated nothing yet."""
Room: TypeAlias = Callable[[int, int], NDArray[np.int32]]
"""Memory for so many masks of so many words: int32 [masks, words], contiguous."""


class ConstraintBuilder:
    """Builds the rules that a request's parameters ask for, for one model and tokenizer."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._grammars = None if config.why_no_grammars() else Grammars(config)

    def __call__(self, sampling: Sampling, prompt: Tokens) -> Rules:
        """What this raises, best a RequestError, ends the request."""
        rules: list[Constraint | Grammar] = []
        if sampling.grammar is not None:
            if self._grammars is None:
                message = f"structured_outputs: {self._config.why_no_grammars()}"
                raise RequestError(message, parameter="structured_outputs")
            rules.append(self._grammars.start(sampling))
        words = [word for word in sampling.bad_words if len(word) > 1]
        if words:
            rules.append(BadWords(words))
        if sampling.thinking is not None:
            rules.append(Thinking(sampling.thinking, prompt.tolist()))
        fixed = TokenRules.of(sampling)
        if rules and fixed is not None:
            rules.append(
                Fixed(fixed, self._config.vocab_size)
            )  # that they contradict each other is seen here
        return rules


def no_constraints(sampling: Sampling, prompt: Tokens) -> Rules:
    """For requests that are the engine's own."""
    return ()


class Masks(NamedTuple):
    """What may come next in some rows of a step."""

    mask_of_row: NDArray[np.int32]
    """[rows]: which of `allowed` is a row's; -1: everything may come"""
    allowed: NDArray[np.int32]
    """[masks, ceil(vocab / 32)], a `Mask` each"""


@dataclass(slots=True)
class _Unheard:
    """A step's tokens that the rules have not been told."""

    tokens: Callable[[], bytes]
    """int32, of all sampling rows; may wait for them"""
    rows: list[tuple[int, int]]
    """(row, slot) of the slots that have rules"""


class Constraints:
    """The rules of all slots of one worker."""

    def __init__(self, build: Build = no_constraints) -> None:
        self._build = build
        self._rules: dict[int, Rules] = {}
        self._errors: dict[int, ErrorInfo] = {}
        self._unheard: deque[_Unheard] = deque()
        self._masks = np.empty(0, np.int32)
        """Of the latest step; kept, so that a step takes no fresh memory for them."""

    def admit(self, admit: Admit) -> bool:
        """Build a slot's rules; True when it has some."""
        tokens = np.frombuffer(admit.tokens, np.int32)
        try:
            rules = self._build(admit.sampling, tokens[: admit.num_prompt_tokens])
            if rules:
                self._rules[admit.slot] = rules
                self._accept(admit.slot, tokens[admit.num_prompt_tokens :].tolist())
        except Exception as error:  # whatever it is, it is this request's
            self._fail(admit.slot, error)
        return admit.slot in self._rules or admit.slot in self._errors

    def release(self, slots: Sequence[int]) -> None:
        """Forget these slots, and the tokens that they would still have been told."""
        if not self._rules and not self._errors:
            return
        gone = set(slots)
        for slot in gone:
            self._rules.pop(slot, None)
            self._errors.pop(slot, None)
        for entry in self._unheard:
            entry.rows = [(row, slot) for row, slot in entry.rows if slot not in gone]

    def expect(self, slots: NDArray[np.int64], tokens: Callable[[], bytes]) -> None:
        """A step samples a token for each of `slots`; `tokens` gives them, once they are asked for."""
        if self._rules:
            rows = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot in self._rules]
            if rows:
                self._unheard.append(_Unheard(tokens, rows))

    def masks(self, slots: NDArray[np.int64], vocab_size: int, room: Room | None = None) -> Masks | None:
        """What may come next in the rows of `slots`; None: everything. Waits for the steps before.

        They are written into what `room` gives, or else into memory that the next call overwrites.
        """
        if not self._rules:
            return None
        self._hear()
        ruled = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot in self._rules]
        if not ruled:
            return None
        allowed = (room or self._room)(len(ruled), -(-vocab_size // 32))
        bound = self._fill([slot for _, slot in ruled], allowed)
        mask_of_row = np.full(len(slots), -1, np.int32)
        for number, (row, _) in enumerate(ruled):
            if bound[number]:
                mask_of_row[row] = number
        return Masks(mask_of_row, allowed) if any(bound) else None

    def failed(self, slots: NDArray[np.int64]) -> list[FailedRow]:
        """Which of these rows belong to requests that cannot go on."""
        if not self._errors:
            return []
        errors = self._errors
        return [FailedRow(row, errors[slot]) for row, slot in enumerate(slots.tolist()) if slot in errors]

    def _hear(self) -> None:
        while self._unheard:
            entry = self._unheard.popleft()
            if entry.rows:
                tokens = np.frombuffer(entry.tokens(), np.int32)
                for row, slot in entry.rows:
                    try:
                        self._accept(slot, [int(tokens[row])])
                    except Exception as error:
                        self._fail(slot, error)

    def _accept(self, slot: int, tokens: list[int]) -> None:
        for rule in self._rules.get(slot, ()):
            for token in tokens:
                rule.accept(token)

    def _fill(self, slots: Sequence[int], masks: NDArray[np.int32]) -> list[bool]:
        """Write what may come next in each slot; False: everything may, or the request has failed."""
        # One after the other: on threads of llguidance's executor 32 masks take three times as long.
        bound = [self._fill_one(slot, mask) for slot, mask in zip(slots, masks, strict=True)]
        for row in np.flatnonzero(~masks.any(axis=1)).tolist():
            if bound[row]:
                bound[row] = False
                self._fail(slots[row], _contradiction(self._rules[slots[row]]))
        return bound

    def _fill_one(self, slot: int, mask: Mask) -> bool:
        first, *others = self._rules[slot]
        try:
            if isinstance(first, Grammar):
                first.write(mask)
                bound = True
            else:
                mask.fill(-1)
                bound = first.fill(mask)
            for rule in others:
                assert not isinstance(rule, Grammar)
                bound |= rule.fill(mask)
        except Exception as error:
            self._fail(slot, error)
            return False
        return bound

    def _room(self, masks: int, words: int) -> NDArray[np.int32]:
        if len(self._masks) < masks * words:
            self._masks = np.empty(2 * masks * words, np.int32)
        return self._masks[: masks * words].reshape(masks, words)

    def _fail(self, slot: int, error: Exception) -> None:
        """The request ends with its next token; until then it goes on without rules."""
        self._rules.pop(slot, None)
        if not isinstance(error, RequestError):
            LOGGER.error("a rule on the next token of slot %d failed", slot, exc_info=error)
            error = RequestError(f"a rule on the next token failed: {type(error).__name__}: {error}")
        self._errors[slot] = ErrorInfo.of(error)


def _contradiction(rules: Rules) -> RequestError:
    parameter = "structured_outputs" if isinstance(rules[0], Grammar) else "allowed_token_ids"
    message = f"{parameter}: what it allows to come next, other parameters forbid"
    return RequestError(message, parameter=parameter, limit="a token that all parameters allow")
