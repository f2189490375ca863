"""Integers on their way from the host to the device: one pinned buffer, one copy, nobody waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TURNS = 3
"""Copies that may be under way: the host writes the next buffer while the device reads the last."""
_SMALLEST = 4096
_ALIGNMENT = 4
"""int32 words: Triton makes wider loads where addresses are multiples of 16 bytes."""


def aligned(size: int) -> int:
    """How many words an array of `size` takes."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """The array on `device`, in the order of its current stream; the host does not wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Staging:
    """Sends arrays to `device` in the order of its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._turn = 0
        self._buffers = [self._buffer(_SMALLEST) for _ in range(_TURNS)]
        self._sent: list[torch.cuda.Event | None] = [None] * _TURNS

    def send(self, *arrays: NDArray[Any]) -> Sequence[Tensor]:
        """The arrays of integers, flat, as int32 on the device; they lie behind one another in one tensor."""
        sizes = [aligned(array.size) for array in arrays]
        there = torch.empty(sum(sizes), dtype=torch.int32, device=self._device)
        self.send_to(there, *arrays)
        return [part[: array.size] for part, array in zip(torch.split(there, sizes), arrays, strict=True)]

    def send_to(self, target: Tensor, *arrays: NDArray[Any]) -> None:
        """The same into `target`, each array at the next place that is `aligned`."""
        at, host = 0, self.reserve(len(target))
        for array in arrays:
            host[at : at + array.size] = array.reshape(-1)
            at += aligned(array.size)
        self.send_reserved(target)

    def reserve(self, size: int) -> NDArray[np.int32]:
        """int32 [size] to write what `send_reserved` is to send; nothing else may be sent in between."""
        turn = self._turn = (self._turn + 1) % _TURNS
        sent = self._sent[turn]
        if sent is not None:
            sent.synchronize()
        if len(self._buffers[turn]) < size:
            self._buffers[turn] = self._buffer(2 * size)
        host: NDArray[np.int32] = self._buffers[turn][:size].numpy()
        return host

    def send_reserved(self, target: Tensor) -> None:
        """Send the first `len(target)` integers of what was reserved last."""
        turn = self._turn
        target.copy_(self._buffers[turn][: len(target)], non_blocking=True)
        if self._on_gpu:
            sent = self._sent[turn] = self._sent[turn] or torch.cuda.Event()
            sent.record()

    def _buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, pin_memory=self._on_gpu)
