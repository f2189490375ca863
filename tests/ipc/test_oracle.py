"""The oracle's function: the same whole, in pieces, and in company."""

from __future__ import annotations

import numpy as np
from headrace.ipc.oracle import absorb, absorb_prompt, next_tokens, oracle_stream
from hypothesis import given, settings
from hypothesis import strategies as st

TOKENS = st.lists(st.integers(0, 100_000), min_size=1, max_size=50)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(TOKENS)
def test_a_prompt_is_its_tokens_one_by_one(tokens: list[int]) -> None:
    state = np.zeros(1, np.uint64)
    for token in tokens:
        state = absorb(state, np.array([token]))
    assert state[0] == absorb_prompt(tokens)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(TOKENS, st.integers(0, 2**63 - 1), st.integers(1, 20))
def test_a_stream_continues_itself(prompt: list[int], seed: int, cut: int) -> None:
    stream = oracle_stream(prompt, seed, 20, 1000)
    assert oracle_stream(prompt + stream[:cut], seed, 20 - cut, 1000) == stream[cut:]
    assert all(0 <= token < 1000 for token in stream)


def test_everything_matters() -> None:
    stream = oracle_stream([1, 2, 3], 0, 8, 50_000)
    assert stream == oracle_stream([1, 2, 3], 0, 8, 50_000)
    for other in (oracle_stream([1, 2, 4], 0, 8, 50_000), oracle_stream([1, 2, 3], 1, 8, 50_000)):
        assert not set(zip(stream, other, strict=True)) & {(token, token) for token in stream}


def test_rows_do_not_see_each_other() -> None:
    states = np.array([absorb_prompt([i]) for i in range(64)])
    seeds, positions = np.arange(64, dtype=np.uint64), np.full(64, 5, np.uint64)
    together = next_tokens(states, seeds, positions, 1000)
    alone = [next_tokens(states[i : i + 1], seeds[i : i + 1], positions[:1], 1000)[0] for i in range(64)]
    assert together.tolist() == [int(token) for token in alone]
    assert len(set(together.tolist())) > 50
