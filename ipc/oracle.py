"""The oracle: a model whose every token can be predicted.

`load_format="oracle"` puts it in place of a network, behind the real worker protocol. Its next token is a
pure function of all tokens so far, the request's seed and the position, so that each stream has one right
answer under any batching, fault or replay; and it costs so little that what remains is the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

U64: TypeAlias = NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)


def absorb_prompt(tokens: NDArray[Any] | Sequence[int]) -> np.uint64:
    """The state after these tokens: the polynomial sum((token + 1) * BASE**(distance from the end))."""
    values = np.asarray(tokens, dtype=np.uint64) + _ONE
    powers = np.ones(len(values), dtype=np.uint64)
    np.multiply.accumulate(np.full(max(len(values) - 1, 0), _BASE), out=powers[1:])
    return np.uint64(np.dot(values, powers[::-1]))


def absorb(states: U64, tokens: NDArray[Any]) -> U64:
    """The states after one more token each."""
    return states * _BASE + (tokens.astype(np.uint64) + _ONE)


def next_tokens(states: U64, seeds: U64, positions: U64, vocab_size: int) -> NDArray[np.int32]:
    """The token that follows each state at each position (splitmix64 of the three)."""
    mixed = states ^ (seeds * _MIX_1) ^ (positions * _MIX_2)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    mixed = mixed ^ (mixed >> np.uint64(31))
    tokens: NDArray[np.int32] = (mixed % np.uint64(vocab_size)).astype(np.int32)
    return tokens


def oracle_logprobs(
    chosen: NDArray[Any], positions: NDArray[Any], tokens: NDArray[Any], vocab_size: int
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Values and ranks of `tokens` where the oracle chose `chosen`; the arrays broadcast.

    The chosen token is the likeliest, the ones that count up from it (and around) follow.
    """
    behind = (tokens.astype(np.int64) - chosen) % vocab_size
    values = -(1 + positions % 64) / 64 - behind / 2
    return values.astype(np.float32), (behind + 1).astype(np.int32)


def oracle_stream(prompt: Sequence[int], seed: int, num_tokens: int, vocab_size: int) -> list[int]:
    """The first `num_tokens` tokens that the oracle says after `prompt`, stop tokens not heeded."""
    state = np.array([absorb_prompt(prompt)], dtype=np.uint64)
    seeds = np.array([seed], dtype=np.uint64)
    stream: list[int] = []
    for position in range(len(prompt), len(prompt) + num_tokens):
        token = next_tokens(state, seeds, np.array([position], dtype=np.uint64), vocab_size)
        stream.append(int(token[0]))
        state = absorb(state, token)
    return stream
