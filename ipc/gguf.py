"""The header of a GGUF file: its metadata and where its tensors lie.

Here because both sides read it: the frontend takes configuration and tokenizer from the metadata, the workers
map the tensors. The `gguf` package's own reader takes two seconds and 150 MB for a vocabulary of 49,000.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ITEMS = 1 << 24


class TensorInfo(NamedTuple):
    """One tensor of the file."""

    shape: tuple[int, ...]
    """As torch orders it, the slowest dimension first."""
    ggml_type: int
    offset: int
    """Bytes from the start of the file."""


class GgufHeader(NamedTuple):
    """What stands before the tensor data."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read it. Raises ConfigError when the file is not a whole GGUF header."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except (OSError, ValueError, struct.error, KeyError, ArithmeticError) as error:
        message = f"model: {str(path)!r} is not a readable GGUF file: {error}"
        raise ConfigError(message, parameter="model", value=path) from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def header(self) -> GgufHeader:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not start with 'GGUF'")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, versions 2 and 3 are known")
        num_tensors, num_entries = self._count(), self._count()
        metadata = {self._string(): self._value(self._scalar("I")) for _ in range(num_entries)}
        relative = [self._tensor() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        tensors = {name: info._replace(offset=info.offset + start) for name, info in relative}
        return GgufHeader(metadata, tensors)

    def _tensor(self) -> tuple[str, TensorInfo]:
        name = self._string()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))
        return name, TensorInfo(shape[::-1], self._scalar("I"), self._scalar("Q"))

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _count(self) -> int:
        count = int(self._scalar("Q"))
        if count > _MAX_ITEMS:
            raise ValueError(f"a count of {count}")
        return count

    def _string(self) -> str:
        length = int(self._scalar("Q"))
        text = self._data[self._at : self._at + length]
        if len(text) != length:
            raise ValueError("the file ends within its header")
        self._at += length
        return text.decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("I"), self._count()
        if item in (_STRING, _ARRAY):
            return [self._value(item) for _ in range(count)]
        layout = f"<{count}{_SCALARS[item]}"
        values = list(struct.unpack_from(layout, self._data, self._at))
        self._at += struct.calcsize(layout)
        return values
