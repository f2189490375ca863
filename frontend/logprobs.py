"""Logprobs as a caller gets them: vLLM's classes, made from the wire's columns when the reader asks. Pure."""

from __future__ import annotations

import codecs
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, overload

import msgspec

from ..ipc.messages import Logprobs, unpack


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """One token's logprob where it was chosen, or might have been."""

    logprob: float
    rank: int | None = None
    """1 is the likeliest of the vocabulary; tokens that are equally likely share a rank."""
    decoded_token: str | None = None
    """The text that the token adds; "" when it is part of a character that it does not complete."""


LogprobsOnePosition: TypeAlias = dict[int, Logprob]
"""By token id; the chosen token comes first."""


@dataclass
class FlatLogprobs(Sequence[LogprobsOnePosition]):
    """The same for many positions as a few flat lists, which cost Python's collector nothing.

    Position i has the entries `start_indices[i]` to `end_indices[i]`; the first token of a prompt has none.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, position: LogprobsOnePosition | None) -> None:
        entries = position or {}
        self.append_fast(
            list(entries),
            [entry.logprob for entry in entries.values()],
            [entry.rank for entry in entries.values()],
            [entry.decoded_token for entry in entries.values()],
        )

    def append_fast(
        self,
        token_ids: Iterable[int],
        logprobs: Iterable[float],
        ranks: Iterable[int | None],
        decoded_tokens: Iterable[str | None],
    ) -> None:
        """Append one position without making a dict of it."""
        self.start_indices.append(len(self.token_ids))
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.ranks.extend(ranks)
        self.decoded_tokens.extend(decoded_tokens)
        self.end_indices.append(len(self.token_ids))

    def extend(self, positions: Iterable[LogprobsOnePosition | None]) -> None:
        for position in positions:
            self.append(position)

    def copy(self) -> FlatLogprobs:
        return self[:]

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> LogprobsOnePosition: ...
    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...
    def __getitem__(self, index: int | slice) -> LogprobsOnePosition | FlatLogprobs:
        if isinstance(index, slice):
            part = FlatLogprobs()
            for position in range(*index.indices(len(self))):
                here = self._entries(position)
                part.append_fast(
                    self.token_ids[here],
                    self.logprobs[here],
                    self.ranks[here],
                    self.decoded_tokens[here],
                )
            return part
        here = self._entries(index)
        columns = (self.token_ids, self.logprobs, self.ranks, self.decoded_tokens)
        entries = zip(*(column[here] for column in columns), strict=True)
        return {token: Logprob(value, rank, text) for token, value, rank, text in entries}

    def __iter__(self) -> Iterator[LogprobsOnePosition]:
        return (self[position] for position in range(len(self)))

    def _entries(self, position: int) -> slice:
        return slice(self.start_indices[position], self.end_indices[position])


SampleLogprobs: TypeAlias = list[LogprobsOnePosition] | FlatLogprobs
PromptLogprobs: TypeAlias = list[LogprobsOnePosition | None] | FlatLogprobs


class WireRow(NamedTuple):
    """One position's entries as they arrived."""

    token_ids: list[int]
    values: list[float]
    ranks: list[int]


def rows_of(columns: Logprobs) -> dict[int, WireRow]:
    """The message's rows by their numbers."""
    ids, ranks, values = unpack(columns.token_ids), unpack(columns.ranks), array("f")
    values.frombytes(columns.values)
    rows: dict[int, WireRow] = {}
    begin = 0
    for number, count in zip(unpack(columns.rows), unpack(columns.counts), strict=True):
        end = begin + count
        rows[number] = WireRow(ids[begin:end].tolist(), values[begin:end].tolist(), ranks[begin:end].tolist())
        begin = end
    return rows


class TokenTexts(dict[int, str | bytes]):
    """Token id to its text, or to its bytes when they are not whole characters; filled on demand."""

    def __init__(self, piece: Callable[[int], str | int | bytes]) -> None:
        """`piece` may also give a single byte."""
        super().__init__()
        self._piece = piece

    def __missing__(self, token: int) -> str | bytes:
        piece = self._piece(token)
        if isinstance(piece, int):
            piece = bytes((piece,))
        if isinstance(piece, bytes):
            with suppress(UnicodeDecodeError):
                piece = piece.decode()
        self[token] = piece
        return piece


class LogprobView:
    """The logprobs of one completion, or of a prompt, from what arrives to what is shown.

    A token whose bytes are not whole characters gets the text that it completes after the tokens before it.
    """

    def __init__(self, texts: TokenTexts | None, flat: bool) -> None:
        """Without `texts` entries have no `decoded_token`."""
        self._texts = texts
        self._flat = flat
        self._partial = b""
        self._fresh: list[WireRow | None] = []
        self._all = self._empty()
        self.cumulative = 0.0
        """Sum of the chosen tokens' logprobs, as far as they were taken."""

    def note(self, row: WireRow | None) -> None:
        """One more position; None has no entries."""
        self._fresh.append(row)

    def take_new(self) -> Any:
        """What was noted since the last time: `SampleLogprobs` or `PromptLogprobs`."""
        fresh, self._fresh = self._fresh, []
        return self._append(self._empty(), fresh)

    def take_all(self) -> Any:
        """All that was noted; the caller's own list."""
        fresh, self._fresh = self._fresh, []
        return self._append(self._all, fresh).copy()

    def _empty(self) -> Any:
        return FlatLogprobs() if self._flat else []

    def _append(self, target: Any, rows: list[WireRow | None]) -> Any:
        for row in rows:
            if row is None:
                target.append(None)
                continue
            self.cumulative += row.values[0]
            entries = zip(*row, self._decode(row.token_ids), strict=True)
            # The chosen token may be among the likeliest again: a dict has it once.
            target.append({token: Logprob(value, rank, text) for token, value, rank, text in entries})
        return target

    def _decode(self, tokens: list[int]) -> list[str | None]:
        if self._texts is None:
            return [None] * len(tokens)
        before = self._partial
        found: list[str | None] = []
        for place, token in enumerate(tokens):
            piece, rest = self._texts[token], b""
            # The chosen token's shows what became of a character that it does not go on with.
            if isinstance(piece, bytes) or (before and token == tokens[0]):
                data = before + (piece.encode() if isinstance(piece, str) else piece)
                piece, used = codecs.utf_8_decode(data, "replace", False)
                rest = data[used:]
            if place == 0:
                self._partial = rest
            found.append(piece)
        return found


class LogprobsAsked(NamedTuple):
    """What a request wants to see."""

    sampled: bool
    prompt: bool
    flat: bool
    texts: TokenTexts | None

    def views(self, count: int) -> list[LogprobView | None]:
        """For each of `count` completions."""
        return [LogprobView(self.texts, self.flat) if self.sampled else None for _ in range(count)]

    def prompt_view(self) -> LogprobView | None:
        if not self.prompt:
            return None
        view = LogprobView(self.texts, self.flat)
        view.note(None)  # nothing precedes the first token
        return view
