"""Incremental text: token ids go in one by one, exact text comes out. Pure.

Exact: the deltas of a completion, put together, are what decoding all its ids at once gives. A character
whose bytes are spread over tokens comes out when it is complete.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

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
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
_FALLBACK: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
_STRIP: dict[str, Any] = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


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


class FallbackPieces(dict[int, str | int]):
    """Token id to its text, or to its byte when it is one of SentencePiece's 256 byte tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._backend = tokenizer.backend
        self._skipped = set(tokenizer.all_special_ids) if skip_special_tokens else set()

    def __missing__(self, token: int) -> str | int:
        shown = None if token in self._skipped else self._backend.id_to_token(token)
        byte = _BYTE_TOKEN.fullmatch(shown or "")
        piece = int(byte[1], 16) if byte else (shown or "").replace("▁", " ")
        self[token] = piece
        return piece


class FallbackDecoder:
    """For SentencePiece BPE as Llama 2 and Mistral have it: "▁" is a space, unknown characters are bytes.

    A run of byte tokens is text only if all of it is valid UTF-8, and one replacement character a byte
    otherwise; so it comes out when it has ended.
    """

    __slots__ = ("_at_start", "_pieces", "_run", "_strips")

    def __init__(self, pieces: FallbackPieces, strips: bool) -> None:
        """`strips`: the text's first character, if it is a space, is not part of it."""
        self._pieces = pieces
        self._strips = strips
        self._at_start = True
        self._run = b""

    def push(self, tokens: Sequence[int]) -> str:
        texts: list[str] = []
        for token in tokens:
            piece = self._pieces[token]
            if isinstance(piece, int):
                self._run += bytes((piece,))
            elif piece:  # a token without text does not end a run
                if self._run:
                    texts.append(self._end_run())
                texts.append(piece)
        return self._begin("".join(texts))

    def finish(self) -> str:
        return self._begin(self._end_run())

    def _end_run(self) -> str:
        run, self._run = self._run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _begin(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            if self._strips:
                return text.removeprefix(" ")
        return text


class StreamDecoder:
    """For every other tokenizer: `DecodeStream` of the tokenizers package, 10 times slower."""

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
        self._make: Callable[[bool], Decoder]
        self.piece: Callable[[int], str | int | bytes]
        """A token's text, or its bytes when they are not whole characters; special tokens too."""
        backend = tokenizer.backend
        if isinstance(backend.decoder, decoders.ByteLevel):
            pieces = [Pieces(tokenizer, skip) for skip in (False, True)]
            self._make = lambda skip: ByteDecoder(pieces[skip])
            self.piece = pieces[False].__getitem__
        elif (steps := _steps(backend)) in (_FALLBACK, [*_FALLBACK, _STRIP]):
            parts = [FallbackPieces(tokenizer, skip) for skip in (False, True)]
            self._make = lambda skip: FallbackDecoder(parts[skip], _STRIP in steps)
            self.piece = parts[False].__getitem__
        else:
            self._make = lambda skip: StreamDecoder(backend, skip)
            self.piece = lambda token: backend.decode([token], skip_special_tokens=False)

    def __call__(self, skip_special_tokens: bool) -> Decoder:
        return self._make(skip_special_tokens)


def _steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """What the tokenizer's own decoder does, as its file says it."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
    return steps
