"""Bad words and thinking budgets: which tokens they take out, after any tokens."""

from __future__ import annotations

from array import array

import numpy as np
from headrace.ipc.messages import Sampling, ThinkingBudget, pack
from headrace.worker.constraints import Constraint
from headrace.worker.rules import BadWords, Thinking, TokenRules
from hypothesis import given
from hypothesis import strategies as st

VOCAB = 40


def allowed(rule: Constraint) -> set[int]:
    mask = np.full(2, -1, np.int32)
    fills = rule.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB]
    assert fills or bits.all()
    return set(np.flatnonzero(bits).tolist())


words = st.lists(st.lists(st.integers(30, 33), min_size=2, max_size=4), min_size=1, max_size=6)


@given(words, st.lists(st.integers(30, 33), max_size=12))
def test_no_allowed_token_completes_a_bad_word(bad: list[list[int]], output: list[int]) -> None:
    rule = BadWords(bad)
    for token in output:
        rule.accept(token)

    def completes(token: int) -> bool:
        return any([*output, token][-len(word) :] == word for word in bad)

    assert allowed(rule) == {token for token in range(VOCAB) if not completes(token)}


def test_thinking_ends_after_its_budget() -> None:
    rule = Thinking(ThinkingBudget(2, begin=1, end=35), [9, 1, 8])
    assert len(allowed(rule)) == VOCAB
    rule.accept(7)
    assert allowed(rule) == {35}
    rule.accept(35)
    for token in (7, 7, 7):
        rule.accept(token)
    assert len(allowed(rule)) == VOCAB


def test_thinking_of_its_own_accord_and_no_budget_at_all() -> None:
    rule = Thinking(ThinkingBudget(0, begin=1, end=35), [1, 35, 5])
    assert len(allowed(rule)) == VOCAB
    rule.accept(1)
    assert allowed(rule) == {35}


def test_fixed_rules() -> None:
    assert TokenRules.of(Sampling(bad_words=[[1, 2]])) is None
    bias = array("f", [0.5, 2.0]).tobytes()
    rules = TokenRules.of(Sampling(bias_tokens=pack([3, 4]), bias_values=bias, bad_words=[[4], [5], [1, 2]]))
    assert rules is not None
    assert dict(zip(rules.biased.tolist(), rules.biases.tolist(), strict=True)) == {
        3: 0.5,
        4: -np.inf,
        5: -np.inf,
    }
    assert len(rules.allowed) == 0
