"""What a core says on its status pipe: a line of JSON for each message, from a process that may be broken."""

from __future__ import annotations

from typing import Any

import msgspec

from ..ipc.decoding import decode
from ..ipc.errors import EngineDeadError
from ..ipc.messages import Fatal, FromStarting

_MAX_BYTES = 1 << 20


class StatusLines:
    """Takes bytes as they come; keeps at most 1 MiB of them."""

    def __init__(self) -> None:
        self._rest = b""
        self._decoder: Any = msgspec.json.Decoder(FromStarting)

    def feed(self, data: bytes) -> list[FromStarting]:
        """The messages that are complete now. Raises EngineDeadError for what cannot be one."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages: list[FromStarting] = [decode(self._decoder, line) for line in lines]
        except msgspec.DecodeError as error:
            raise EngineDeadError(f"the engine core reports what cannot be read: {error}") from None
        if len(self._rest) > _MAX_BYTES:
            raise EngineDeadError("the engine core reports without end")
        return messages

    def keep(self, data: bytes) -> None:
        """Only for `last_words`: forget all but the end."""
        self._rest = (self._rest + data)[-_MAX_BYTES:]

    def last_words(self) -> Fatal | None:
        """The `Fatal` among what was kept."""
        for line in self._rest.splitlines():
            try:
                message = decode(self._decoder, line)
            except msgspec.DecodeError:
                continue
            if isinstance(message, Fatal):
                return message
        return None
