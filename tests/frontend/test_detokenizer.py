"""Incremental text is exact: put together it is what decoding everything at once gives."""

from __future__ import annotations

import itertools

import pytest
from headrace.frontend.detokenizer import DecoderFactory
from headrace.frontend.tokenizer import Tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

token_lists = st.lists(st.integers(0, 420), max_size=40)
"""Bytes of characters in any order, special and unknown ids."""


@pytest.mark.parametrize("skip", [False, True])
@given(ids=token_lists, cuts=st.sets(st.integers(0, 40)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_byte_level_deltas_are_exact(
    tokenizer: Tokenizer, skip: bool, ids: list[int], cuts: set[int]
) -> None:
    decoder = DecoderFactory(tokenizer)(skip)
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    deltas = [decoder.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    assert "".join(deltas) + decoder.finish() == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("skip", [False, True])
@given(ids=st.lists(st.integers(0, 400) | st.integers(259, 266), max_size=30), data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)
def test_deltas_are_exact_in_every_family(
    any_tokenizer: Tokenizer, skip: bool, ids: list[int], data: st.DataObject
) -> None:
    """Any ids, so broken characters too, cut up in any way; the last are SentencePiece's words."""
    decoder = DecoderFactory(any_tokenizer)(skip)
    text, rest = "", list(ids)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        text += decoder.push(rest[:size])
        rest = rest[size:]
    assert text + decoder.finish() == any_tokenizer.decode(ids, skip)


@given(
    text=st.text(st.characters(codec="utf-8"), max_size=30)
    | st.sampled_from(["🎡👩‍👩‍👧", "水車は回る", "  a\n\n b "])
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)
def test_real_text_comes_back(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    decoder = DecoderFactory(any_tokenizer)(False)
    assert "".join(decoder.push([i]) for i in ids) + decoder.finish() == any_tokenizer.decode(ids, False)


def test_sentencepiece_strips_the_first_space_of_the_text_alone(spm_tokenizer: Tokenizer) -> None:
    decoder = DecoderFactory(spm_tokenizer)(True)
    ids = [spm_tokenizer.backend.token_to_id(piece) for piece in ("<s>", "▁the", "▁mill", "▁▁", "▁mill")]
    assert [decoder.push([i]) for i in ids if i is not None] == ["", "the", " mill", "  ", " mill"]


def test_sentencepiece_bytes_come_when_their_run_has_ended(spm_tokenizer: Tokenizer) -> None:
    """One bad byte makes replacement characters of the good ones before it."""
    decoder = DecoderFactory(spm_tokenizer)(True)
    mill = spm_tokenizer.backend.token_to_id("▁mill")
    assert mill is not None
    assert [decoder.push([3 + byte]) for byte in "水".encode()] == ["", "", ""]
    assert decoder.push([mill]) == "水 mill"
    assert decoder.push([3 + byte for byte in "é".encode()] + [3 + 0xE6]) == ""
    assert decoder.finish() == "\ufffd" * 3


def test_character_comes_when_it_is_whole(tokenizer: Tokenizer) -> None:
    decoder = DecoderFactory(tokenizer)(True)
    ids = [tokenizer.backend.token_to_id(c) for c in "ðŁİĬ"]  # the four bytes of one emoji
    deltas = [decoder.push([i]) for i in ids if i is not None]
    assert deltas == ["", "", "", "🎊"]
