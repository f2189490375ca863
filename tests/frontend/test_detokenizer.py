"""Incremental text is exact: put together it is what decoding everything at once gives."""

from __future__ import annotations

import itertools

import pytest
from headrace.frontend.detokenizer import DecoderFactory, StopStrings
from headrace.frontend.tokenizer import Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

token_lists = st.lists(st.integers(0, 420), max_size=40)
"""Bytes of characters in any order, special and unknown ids."""


@pytest.mark.parametrize("skip", [False, True])
@given(ids=token_lists, cuts=st.sets(st.integers(0, 40)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_byte_level_deltas_are_exact(
    tokenizer: Tokenizer, skip: bool, ids: list[int], cuts: set[int]
) -> None:
    decoder = DecoderFactory(tokenizer)(skip)
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    deltas = [decoder.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    assert "".join(deltas) + decoder.finish() == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("skip", [False, True])
@given(ids=st.lists(st.integers(1, 266), max_size=20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_sentencepiece_deltas_are_exact_in_whole_characters(
    spm_tokenizer: Tokenizer, skip: bool, ids: list[int]
) -> None:
    ids = [token for token in ids if not 3 + 128 <= token < 3 + 256]  # no broken characters
    decoder = DecoderFactory(spm_tokenizer)(skip)
    assert "".join(decoder.push([i]) for i in ids) + decoder.finish() == spm_tokenizer.decode(ids, skip)


def test_sentencepiece_character_of_three_bytes(spm_tokenizer: Tokenizer) -> None:
    decoder = DecoderFactory(spm_tokenizer)(True)
    deltas = [decoder.push([3 + byte]) for byte in "水".encode()]
    assert deltas == ["", "", "水"]
    assert decoder.push([3 + 0xE6]) == ""
    assert decoder.finish() == "\ufffd"


def test_character_comes_when_it_is_whole(tokenizer: Tokenizer) -> None:
    decoder = DecoderFactory(tokenizer)(True)
    ids = [tokenizer.backend.token_to_id(c) for c in "ðŁİĬ"]  # the four bytes of one emoji
    deltas = [decoder.push([i]) for i in ids if i is not None]
    assert deltas == ["", "", "", "🎊"]


# --- stop strings ----------------------------------------------------------------------------------------


def run(stops: list[str], include: bool, parts: list[str]) -> tuple[list[str], str | None]:
    """The deltas that a reader sees (the last is the flush), and the stop string found."""
    watch = StopStrings(stops, include)
    shown: list[str] = []
    for part in parts:
        shown.append(watch.push(part))
        if watch.found is not None:
            return shown, watch.found
    shown.append(watch.finish())
    return shown, None


@pytest.mark.parametrize(
    ("stops", "include", "parts", "shown", "found"),
    [
        (["END"], False, ["abc", "E", "N", "D", "x"], ["a", "b", "c", ""], "END"),
        (["END"], True, ["abc", "E", "N", "Dx"], ["abc", "E", "N", "D"], "END"),
        (["END"], False, ["abEN"], ["ab", "EN"], None),
        (["."], False, ["ab", "c.d"], ["ab", "c"], "."),
        (["."], True, ["ab", "c.d"], ["ab", "c."], "."),
        (["bc", "abcd"], False, ["zabcd"], ["z"], "abcd"),
        (["x", "ab"], False, ["a", "bx"], ["", ""], "ab"),
        (["aa"], False, ["a", "a"], ["", ""], "aa"),
    ],
)
def test_stop_strings(
    stops: list[str], include: bool, parts: list[str], shown: list[str], found: str | None
) -> None:
    assert run(stops, include, parts) == (shown, found)


@given(
    text=st.text("ab.", max_size=30),
    stops=st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
    include=st.booleans(),
    size=st.integers(1, 5),
)
def test_text_ends_at_the_stop_string(text: str, stops: list[str], include: bool, size: int) -> None:
    """However the text is cut up: what is shown is a whole prefix, up to (or with) a stop string."""
    shown, found = run(stops, include, [text[i : i + size] for i in range(0, len(text), size)])
    whole = "".join(shown)
    if found is None:
        assert whole == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(whole if include else whole + found)
        assert whole.endswith(found) or not include
        # The first stop string to be complete ends it, within the part that completes it.
        first_end = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert len(whole) <= first_end + size


def test_unchecked_text_does_not_stop_but_may_begin_a_stop_string() -> None:
    watch = StopStrings(["abc"], False)
    assert watch.push("abcab", check=False) == "abc"
    assert watch.push("c") == ""
    assert watch.found == "abc"
