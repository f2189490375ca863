"""What one request says about token ids: fixed rules, bad words, a limit on thinking, logprobs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..ipc.messages import Sampling, ThinkingBudget

if TYPE_CHECKING:
    from .constraints import Mask


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What holds for every token of a request, whatever came before."""

    allowed: NDArray[np.int64]
    """These alone may come; empty: all."""
    biased: NDArray[np.int64]
    biases: NDArray[np.float32]
    """What is added to the logits of `biased`; -inf for bad words of one token."""

    @classmethod
    def of(cls, sampling: Sampling) -> TokenRules | None:
        """None when the parameters say nothing."""
        tokens = np.frombuffer(sampling.bias_tokens, np.int32).tolist()
        biases = dict(zip(tokens, np.frombuffer(sampling.bias_values, np.float32).tolist(), strict=True))
        biases |= {word[0]: -np.inf for word in sampling.bad_words if len(word) == 1}
        allowed = np.frombuffer(sampling.allowed_token_ids, np.int32).astype(np.int64)
        if not biases and not len(allowed):
            return None
        return cls(allowed, np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32))


class Wish(NamedTuple):
    """What logprobs a row wants beside the chosen token's."""

    most: int
    """Of so many of the likeliest tokens."""
    token_ids: tuple[int, ...] = ()
    """Or of these; then `most` is 0."""

    @classmethod
    def of(cls, sampling: Sampling) -> Wish | None:
        """For each generated token; None: nothing, not even the chosen one's."""
        if sampling.logprob_token_ids:
            return cls(0, tuple(sampling.logprob_token_ids))
        return None if sampling.logprobs is None else cls(sampling.logprobs)


class PromptRow(NamedTuple):
    """A row of a plan that computes positions of its prompt whose next tokens' logprobs are wanted."""

    row: int
    slot: int
    start: int
    """The first position that it computes."""
    length: int
    """Positions, from `start` on, that are followed by a token of the prompt; at least 1."""
    wish: Wish


class BadWords:
    """Sequences of at least two tokens that must not be generated: the last token is not allowed after the
    others. What precedes it must have been generated; the prompt does not count."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._words = [(list(word[:-1]), word[-1]) for word in words]
        self._tail: deque[int] = deque(maxlen=max(len(word) for word in words) - 1)

    def accept(self, token: int) -> None:
        self._tail.append(token)

    def fill(self, mask: Mask) -> bool:
        tail = list(self._tail)
        ends = [last for before, last in self._words if tail[-len(before) :] == before]
        for token in ends:
            mask[token // 32] &= ~_bit(token)
        return bool(ends)


class Thinking:
    """After `budget` tokens of thinking the token that ends it is forced.

    Thinking begins with the token `begin`, in the prompt or after it, and ends with `end`.
    """

    def __init__(self, wanted: ThinkingBudget, prompt: Iterable[int]) -> None:
        self._wanted = wanted
        self._spent: int | None = None
        """Tokens of the thinking under way; None: there is none."""
        for token in prompt:
            self.accept(token)

    def accept(self, token: int) -> None:
        if token == self._wanted.end:
            self._spent = None
        elif self._spent is not None:
            self._spent += 1
        elif token == self._wanted.begin:
            self._spent = 0

    def fill(self, mask: Mask) -> bool:
        if self._spent is None or self._spent < self._wanted.budget:
            return False
        mask[:] = 0
        mask[self._wanted.end // 32] = _bit(self._wanted.end)
        return True


class Fixed:
    """`TokenRules` as a constraint, where there are others: the mask then tells whether anything is left."""

    def __init__(self, rules: TokenRules, vocab_size: int) -> None:
        allowed = np.full(vocab_size, not len(rules.allowed), np.bool_)
        allowed[rules.allowed] = True
        allowed[rules.biased[np.isneginf(rules.biases)]] = False
        packed = np.packbits(allowed, bitorder="little")
        self._mask = np.zeros(-(-vocab_size // 32), np.int32)
        self._mask.view(np.uint8)[: len(packed)] = packed

    def accept(self, token: int) -> None:
        """Nothing depends on it."""

    def fill(self, mask: Mask) -> bool:
        mask &= self._mask
        return True


def _bit(token: int) -> np.int32:
    return np.uint32(1 << token % 32).view(np.int32)
