"""Tensor parallelism: one rank's view of its peers.

Knows collectives, not models: what is split and where sums are due stands in `layers`. The process groups are
plain objects, not torch.distributed's process-wide default group, so nothing here is global.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """A rank and the collectives it takes part in. With one rank every collective is the identity."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A ProcessGroupGloo or ProcessGroupNCCL (whose stubs lack the collectives); None when `size` is 1."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            self.group.allreduce([tensor]).wait()
        return tensor

    def all_gather_last(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors (of equal shapes) side by side along the last dimension."""
        if self.group is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.group.allgather([parts], [tensor.contiguous()]).wait()
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Rank `src`'s tensor, in place."""
        if self.group is not None:
            self.group.broadcast(tensor, src).wait()
        return tensor


def connect(rank: int, size: int, device: torch.device, rendezvous: str) -> TensorParallel:
    """Meet the other ranks: over NCCL on CUDA devices, over gloo on CPUs.

    `rendezvous` is the path of a file that all ranks can open and that does not exist before; returns once
    all `size` ranks have come.
    """
    if size == 1:
        return TensorParallel()
    store = dist.FileStore(rendezvous, size)  # type: ignore[attr-defined]  # the stubs do not export it
    if device.type == "cuda":
        return TensorParallel(
            rank, size, dist.ProcessGroupNCCL(store, rank, size, dist.ProcessGroupNCCL.Options())
        )
    # Without a named interface gloo asks the resolver for this machine's hostname, which may not resolve.
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return TensorParallel(rank, size, dist.ProcessGroupGloo(store, rank, size, options))
