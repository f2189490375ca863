"""Logprobs as the reader gets them: vLLM's shapes, and decoded tokens that put together are the text."""

from __future__ import annotations

from array import array

import pytest
from headrace.frontend.detokenizer import DecoderFactory
from headrace.frontend.logprobs import FlatLogprobs, Logprob, LogprobView, TokenTexts, WireRow, rows_of
from headrace.frontend.tokenizer import Tokenizer
from headrace.ipc.messages import Logprobs, pack
from hypothesis import given
from hypothesis import strategies as st

from tests.frontend.conftest import sentencepiece

TEXT = "naïve 🎡 水車は\n<x>"


def test_rows_of_columns() -> None:
    values = array("f", [-1.0, -0.5, -2.0]).tobytes()
    columns = Logprobs(pack([4, 0]), pack([2, 1]), pack([9, 5, 8]), values, pack([2, 1, 1]))
    assert rows_of(columns) == {4: WireRow([9, 5], [-1.0, -0.5], [2, 1]), 0: WireRow([8], [-2.0], [1])}


def test_the_chosen_token_comes_first_and_once() -> None:
    view = LogprobView(None, flat=False)
    view.note(WireRow([9, 5, 9], [-1.0, -0.5, -1.0], [2, 1, 2]))
    (position,) = view.take_new()
    assert list(position.items()) == [(9, Logprob(-1.0, 2)), (5, Logprob(-0.5, 1))]
    assert view.cumulative == -1.0


def test_new_and_all() -> None:
    rows = [WireRow([token], [-float(token)], [1]) for token in range(4)]
    new, everything = LogprobView(None, flat=False), LogprobView(None, flat=False)
    for view in (new, everything):
        view.note(rows[0])
    assert [list(position) for position in new.take_new()] == [[0]]
    first = everything.take_all()
    for view in (new, everything):
        view.note(rows[1])
        view.note(rows[2])
    assert [list(position) for position in new.take_new()] == [[1], [2]]
    assert [list(position) for position in everything.take_all()] == [[0], [1], [2]]
    assert [list(position) for position in first] == [[0]]
    assert new.cumulative == everything.cumulative == -3.0


def test_flat_is_the_same_in_columns() -> None:
    rows = [WireRow([9, 5], [-1.0, -0.5], [2, 1]), None, WireRow([8], [-2.0], [1])]
    flat, plain = LogprobView(None, flat=True), LogprobView(None, flat=False)
    for row in rows:
        flat.note(row)
        plain.note(row)
    shown = flat.take_all()
    assert isinstance(shown, FlatLogprobs)
    assert (shown.start_indices, shown.end_indices) == ([0, 2, 2], [2, 2, 3])
    assert shown.token_ids == [9, 5, 8]
    assert list(shown) == [position or {} for position in plain.take_all()]
    assert list(shown[1:]) == list(shown)[1:]
    again = FlatLogprobs()
    again.extend(shown)
    assert again == shown


def decoded(tokenizer: Tokenizer, chosen: list[int], others: list[int]) -> list[dict[int, str | None]]:
    view = LogprobView(TokenTexts(DecoderFactory(tokenizer).piece), flat=False)
    for token in chosen:
        view.note(WireRow([token, *others], [-1.0] * (1 + len(others)), [1] * (1 + len(others))))
    return [{token: entry.decoded_token for token, entry in here.items()} for here in view.take_new()]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_decoded_tokens_put_together_are_the_text(kind: str, tokenizer: Tokenizer) -> None:
    if kind == "sentencepiece":
        tokenizer = sentencepiece(strips=False)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    if kind == "sentencepiece":
        ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") or 0 for byte in TEXT.encode()]
    pieces = [next(iter(here.values())) for here in decoded(tokenizer, ids, [])]
    assert "".join(piece or "" for piece in pieces) == TEXT
    assert "\ufffd" not in "".join(piece or "" for piece in pieces)


@given(st.lists(st.integers(0, 300), max_size=20))
def test_pieces_of_broken_characters_are_the_text_too(tokenizer: Tokenizer, ids: list[int]) -> None:
    """Also where the chosen token is among the likeliest again."""
    ids = [token % len(tokenizer) for token in ids]
    shown = decoded(tokenizer, ids, [*ids, 5])
    decoder = DecoderFactory(tokenizer)(False)
    assert "".join(here[token] or "" for token, here in zip(ids, shown, strict=True)) == decoder.push(ids)


def test_other_tokens_are_decoded_after_those_before(tokenizer: Tokenizer) -> None:
    wheel = tokenizer.encode("🎡", add_special_tokens=False)
    if len(wheel) == 1:  # it was learned as a whole: spell it
        wheel = [tokenizer.backend.token_to_id(c) or 0 for c in tokenizer.backend.id_to_token(wheel[0]) or ""]
    plain = tokenizer.encode("x", add_special_tokens=False)[0]
    found = decoded(tokenizer, wheel, [plain, wheel[-1]])
    assert [next(iter(here.values())) for here in found] == [""] * (len(wheel) - 1) + ["🎡"]
    assert all(here[plain] == "x" for here in found)
    assert found[-1][wheel[-1]] == "🎡"
