"""Repetition is found at the token that completes it, as a search over all the tokens would."""

from __future__ import annotations

from headrace.frontend.repetition import RepetitionDetectionParams, RepetitionDetector
from hypothesis import given
from hypothesis import strategies as st


def repeats(tokens: list[int], wanted: RepetitionDetectionParams) -> bool:
    """The definition: the last tokens are one pattern, `min_count` times."""
    for size in range(max(wanted.min_pattern_size, 1), wanted.max_pattern_size + 1):
        whole = size * wanted.min_count
        if len(tokens) >= whole and tokens[-whole:] == tokens[-size:] * wanted.min_count:
            return True
    return False


@given(
    st.lists(st.integers(0, 2), max_size=60),
    st.integers(1, 5),
    st.integers(0, 5),
    st.integers(2, 4),
    st.integers(0, 10),
)
def test_as_a_search_finds_it(tokens: list[int], longest: int, shortest: int, count: int, first: int) -> None:
    wanted = RepetitionDetectionParams(longest, min(shortest, longest), count)
    detector = RepetitionDetector(wanted, first)
    found = [detector.push(token) for token in tokens]
    assert found == [i + 1 >= first and repeats(tokens[: i + 1], wanted) for i in range(len(tokens))]


def test_nothing_is_looked_for_by_default() -> None:
    detector = RepetitionDetector(RepetitionDetectionParams(), 0)
    assert not any(detector.push(1) for _ in range(100))
