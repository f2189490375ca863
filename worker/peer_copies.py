"""Large messages between two GPUs by their copy engines, which leave every multiprocessor to the products.

A collective's kernel beside products takes processors from them, and a product that has divided itself among
all processors then waits for the one that it did not get. A copy takes none.

Each rank has an inbox of a few places in its own memory. Its peer copies a message to a place and then writes
the message's number beside the inbox; before the message is used, the stream waits for that number. Both are
operations of the stream: no kernel, and nothing for the host to wait for. If a peer never comes, the stream
waits until its process ends.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import peer_memory

_PLACES = 4
"""A rank begins an exchange at most two ahead of those it has ended. When it begins number n it has ended
n - 2, so its peer has begun that one, and had ended n - 4 before: the place of n - 4 is free."""
_NUMBER_BYTES = 16
_CAN_FLUSH, _WAIT_AND_FLUSH = 98, 1 << 30
"""CUDA's attribute of a device that can order what its peers write, where that needs asking for; and how."""


class PeerCopies:
    """Exchanges with the other one of two ranks. All on the device that is current."""

    def __init__(self, rank: int, device: torch.device, max_bytes: int, store: Any) -> None:
        """Both ranks call it. `max_bytes`: of a message; `store`: that the ranks have in common."""
        self._max_bytes = -(-max_bytes // 256) * 256
        self._inbox = peer_memory.allocate(_PLACES * self._max_bytes + _NUMBER_BYTES, device)
        self._inbox[-_NUMBER_BYTES:].zero_()
        addresses = peer_memory.share(self._inbox, rank, 2, store)
        self._own, self._peer = addresses[rank], addresses[1 - rank]
        self._stream = torch.cuda.Stream(device)
        can_flush = peer_memory.device_attribute(_CAN_FLUSH)
        self._wait = ctypes.c_uint(_WAIT_AND_FLUSH if can_flush else 0)
        self._count = 0

    def serve(self, message: Tensor) -> bool:
        """Whether `exchange` can take such messages."""
        return message.numel() * message.itemsize <= self._max_bytes

    def exchange(self, message: Tensor) -> Callable[[], Tensor]:
        """Begin to exchange messages of equal shape, dense. What it returns ends that, for later work of the
        current stream: `message` has been sent, and the peer's, which it gives, has come and stays until two
        more exchanges have ended.
        """
        assert message.is_contiguous()
        assert not torch.cuda.is_current_stream_capturing(), "a graph would exchange the same number again"
        place = self._count % _PLACES * self._max_bytes
        self._count += 1
        number = ctypes.c_uint32(self._count)  # the driver compares numbers modulo 2^32
        size = message.numel() * message.itemsize
        self._stream.wait_stream(torch.cuda.current_stream())
        stream = ctypes.c_void_p(self._stream.cuda_stream)
        to, of = ctypes.c_uint64(self._peer + place), ctypes.c_uint64(message.data_ptr())
        peer_memory.driver("cuMemcpyDtoDAsync_v2", to, of, ctypes.c_size_t(size), stream)
        peer_memory.driver("cuStreamWriteValue32_v2", stream, self._number_at(self._peer), number, 0)
        sent = self._stream.record_event()

        def end() -> Tensor:
            current = torch.cuda.current_stream()
            current.wait_event(sent)
            stream = ctypes.c_void_p(current.cuda_stream)
            peer_memory.driver(
                "cuStreamWaitValue32_v2", stream, self._number_at(self._own), number, self._wait
            )
            return self._inbox[place : place + size].view(message.dtype).view(message.shape)

        return end

    def _number_at(self, base: int) -> ctypes.c_uint64:
        return ctypes.c_uint64(base + _PLACES * self._max_bytes)
