"""Incremental text: token ids go in one by one, exact text comes out, and stop strings are found. Pure.

Exact: the deltas of a completion, put together, are what decoding all its ids at once gives. A character
whose bytes are spread over tokens comes out when it is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

import tokenizers
from tokenizers import decoders

from .tokenizer import Tokenizer


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character: this finds the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    codes = [(byte, byte) for byte in shown] + [(byte, 256 + i) for i, byte in enumerate(hidden)]
    return {chr(code): byte for byte, code in codes}


_BYTES = _byte_alphabet()


class Decoder(Protocol):
    """Ids to text, one completion's."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""

    def finish(self) -> str:
        """The rest: what an incomplete character at the end amounts to."""


class Pieces(dict[int, str | bytes]):
    """Token id to its text, or to its bytes when they are not whole characters; filled on demand.

    Shared by all completions of a tokenizer. An id that the tokenizer does not know has no text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._backend = tokenizer.backend
        self._skipped = set(tokenizer.all_special_ids) if skip_special_tokens else set()

    def __missing__(self, token: int) -> str | bytes:
        shown = None if token in self._skipped else self._backend.id_to_token(token)
        piece = _piece(shown) if shown else ""
        self[token] = piece
        return piece


def _piece(shown: str) -> str | bytes:
    if not all(character in _BYTES for character in shown):
        return shown  # an added token, kept as it is
    data = bytes([_BYTES[character] for character in shown])
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


class ByteDecoder:
    """For byte-level BPE (GPT-2, OPT, Llama 3, Qwen, SmolLM): a look-up for each token."""

    __slots__ = ("_partial", "_pieces")

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._partial = b""

    def push(self, tokens: Sequence[int]) -> str:
        pieces = self._pieces
        if len(tokens) == 1 and not self._partial:
            piece = pieces[tokens[0]]
            if type(piece) is str:
                return piece
        texts: list[str] = []
        for token in tokens:
            piece = pieces[token]
            if type(piece) is str and not self._partial:
                texts.append(piece)
                continue
            data = self._partial + (piece.encode() if isinstance(piece, str) else piece)
            text, used = codecs.utf_8_decode(data, "replace", False)
            self._partial = data[used:]
            texts.append(text)
        return "".join(texts)

    def finish(self) -> str:
        text, _ = codecs.utf_8_decode(self._partial, "replace", True)
        self._partial = b""
        return text


class StreamDecoder:
    """For every other tokenizer: `DecodeStream` of the tokenizers package, 10 times slower.

    Exact but for broken characters of SentencePiece models: there, one bad byte turns the whole characters
    before it into replacement characters too, which may have been shown by then.
    """

    __slots__ = ("_backend", "_held", "_shown", "_skip", "_stream", "_tokens")

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._stream = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []
        self._held: list[int] = []
        """Tokens since the last text."""
        self._shown: list[str] = []

    def push(self, tokens: Sequence[int]) -> str:
        before = len(self._shown)
        for token in tokens:
            self._tokens.append(token)
            self._held.append(token)
            if text := self._stream.step(self._backend, token):
                self._shown.append(text)
                self._held.clear()
        return "".join(self._shown[before:])

    def finish(self) -> str:
        """Decodes everything once more: the stream keeps back what looks incomplete."""
        shown = "".join(self._shown)
        whole = self._backend.decode(self._tokens, skip_special_tokens=self._skip)
        if whole.startswith(shown):
            return whole[len(shown) :]
        return self._backend.decode(self._held, skip_special_tokens=self._skip)


class DecoderFactory:
    """Makes the fitting `Decoder` for each completion of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        self._pieces: dict[bool, Pieces] | None = None
        if isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
            self._pieces = {skip: Pieces(tokenizer, skip) for skip in (False, True)}

    def __call__(self, skip_special_tokens: bool) -> Decoder:
        if self._pieces is None:
            return StreamDecoder(self._backend, skip_special_tokens)
        return ByteDecoder(self._pieces[skip_special_tokens])


class StopStrings:
    """Finds stop strings in text that arrives in parts.

    Text that may turn out to be the start of a stop string (the longest one's length - 1) is held back, so
    that nothing is shown which later has to be taken away; with `include` there is nothing to take away.
    """

    __slots__ = ("_hold", "_include", "_keep", "_stops", "_window", "found")

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._hold = not include
        self._keep = max(len(stop) for stop in stops) - 1
        self._window = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, new: str, check: bool = True) -> str:
        """The text that can be shown now. Without `check` no stop string may end in `new`."""
        known = len(self._window)
        text = self._window + new
        if check and new and (cut := self._find(text, known)) is not None:
            self._window = ""
            return text[0 if self._hold else known : cut]
        split = max(len(text) - self._keep, 0)
        self._window = text[split:]
        return text[:split] if self._hold else new

    def finish(self) -> str:
        """What was held back."""
        held = self._window if self._hold else ""
        self._window = ""
        return held

    def _find(self, text: str, known: int) -> int | None:
        """Where the text ends: at the first stop string that ends beyond `known`."""
        best = -1
        for stop in self._stops:
            at = text.find(stop, max(known - len(stop) + 1, 0))
            if at >= 0 and (best < 0 or at < best):
                best, self.found = at, stop
        if self.found is None:
            return None
        return best + len(self.found) if self._include else best
