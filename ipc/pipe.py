"""The pipe between the core and one worker: framed messages over a Unix socket pair.

A socket pair has no name that anyone else could connect to, needs no thread of its own, and its end of file
is the other side's death. Frames are a little-endian uint32 length and a MessagePack message.
"""

from __future__ import annotations

import math
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from .decoding import decode

Send = TypeVar("Send", bound=msgspec.Struct)
Recv = TypeVar("Recv", bound=msgspec.Struct)

_HEADER = struct.Struct("<I")
_CHUNK = 1 << 20
_BUFFER = 1 << 22
"""Bytes asked of the kernel for each direction; it may give less, which costs time but nothing else."""


class PipeClosedError(ConnectionError):
    """The other process is gone."""


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a new pipe; hand one's descriptor to the child and close it here."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


class Pipe(Generic[Send, Recv]):
    """One end. `recv` is the union that arrives here."""

    def __init__(self, sock: socket.socket, recv: Any, max_bytes: int = 1 << 32) -> None:
        """Frames that arrive are refused beyond `max_bytes`."""
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self._sock = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Recv] = msgspec.msgpack.Decoder(recv)
        self._max_bytes = max_bytes
        self._received = bytearray()
        self._unsent = bytearray()

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Send) -> None:
        """Send one message, waiting for room. Raises PipeClosedError."""
        self.send_frame(frame(self._encoder.encode(message)))

    def send_frame(self, data: bytes) -> None:
        """Send what `frame` made: the same bytes can go to many pipes.

        While there is no room it takes in what the other side has to say, so that two processes which send
        at the same time cannot wait for each other.
        """
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except BlockingIOError:
                if wait([self.fileno()], None, select.POLLIN | select.POLLOUT)[0][1] & select.POLLIN:
                    self._read()
            except ConnectionError as error:
                raise PipeClosedError("the other process is gone") from error

    def post_frame(self, data: bytes) -> None:
        """Send what `frame` made without ever waiting: `flush` sends what there was no room for."""
        self._unsent += data
        self.flush()

    def flush(self) -> bool:
        """Send what is left of the posted frames; True when nothing is. Raises PipeClosedError."""
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return False
        except ConnectionError as error:
            raise PipeClosedError("the other process is gone") from error
        return True

    def recv(self, timeout: float | None = None) -> Recv | None:
        """The next message, or None after `timeout` seconds (None waits, 0 polls).

        Raises PipeClosedError, and msgspec.DecodeError for what cannot be read.
        """
        while (message := self._take()) is None:
            if not wait([self.fileno()], timeout):
                return None
            self._read()
        return message

    def has_buffered(self) -> bool:
        """True when `recv` would not have to read: what was taken in never shows on the descriptor again."""
        buffered = len(self._received)
        if buffered < 4:
            return False
        size: int = _HEADER.unpack_from(self._received)[0]
        return buffered >= 4 + size or size > self._max_bytes

    def close(self) -> None:
        self._sock.close()

    def _read(self) -> None:
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            raise PipeClosedError("the other process is gone")
        self._received += data

    def _take(self) -> Recv | None:
        if not self.has_buffered():
            return None
        size = _HEADER.unpack_from(self._received)[0]
        if size > self._max_bytes:
            raise msgspec.DecodeError(f"a frame of {size} bytes; {self._max_bytes} are the limit")
        end = 4 + size
        message = decode(self._decoder, memoryview(self._received)[4:end])
        del self._received[:end]
        return message


def frame(body: bytes) -> bytes:
    """A message's bytes with their length in front."""
    return _HEADER.pack(len(body)) + body


def poll_pipes(pipes: Sequence[Pipe[Any, Any]], timeout: float | None) -> list[int]:
    """Indices of the pipes that have something to read (or have closed), waiting up to `timeout` seconds."""
    ready = [i for i, pipe in enumerate(pipes) if pipe.has_buffered()]
    if ready:
        return ready
    readable = {number for number, _ in wait([pipe.fileno() for pipe in pipes], timeout)}
    return [i for i, pipe in enumerate(pipes) if pipe.fileno() in readable]


def wait(
    descriptors: Sequence[int], timeout: float | None, events: int = select.POLLIN
) -> list[tuple[int, int]]:
    """Those that have news (and which), after `timeout` seconds at most.

    `select.select` raises for descriptors beyond 1023, which a process with many connections has.
    """
    poller = select.poll()
    for number in descriptors:
        poller.register(number, events)
    return poller.poll(None if timeout is None else math.ceil(1000 * timeout))
