"""Bytes from another process into a message, or one kind of error."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

M = TypeVar("M", covariant=True)


class Decoder(Protocol[M]):
    """msgspec's, for MessagePack or JSON."""

    def decode(self, data: bytes | memoryview, /) -> M: ...


def decode(decoder: Decoder[M], data: bytes | memoryview) -> M:
    """The message. Raises msgspec.DecodeError, whatever is wrong: msgspec itself lets text that is not UTF-8
    and nesting that is too deep out as other errors."""
    try:
        return decoder.decode(data)
    except msgspec.DecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error
