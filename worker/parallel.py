"""Tensor parallelism: one rank's view of its peers.

Knows collectives, not models: what is split and where sums are due stands in `layers`. The process groups are
plain objects, not torch.distributed's process-wide default group, so nothing here is global.

Between GPUs small messages go through mailboxes in peer memory (`kernels.all_reduce`), whose kernels can be
recorded in CUDA graphs; large ones are copied (`peer_copies`) between two, and go through NCCL between more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ipc.errors import ConfigError
from ..kernels.all_reduce import all_reduce_triton, one_shot_layout, square_parts, two_shot_layout
from ..kernels.draw_tokens import Share, winners_layout
from ..kernels.mailbox import Layout, Mailbox, empty, make_mailbox
from . import peer_memory
from .peer_copies import PeerCopies


def _largest_in_one_shot(size: int) -> int:
    """Bytes of the largest message that is summed in one shot; larger ones take two.

    Two ranks send as much either way. Four send half as much in two shots, which on H200s are as fast when
    each sends 0.4 MiB to the others together.
    """
    return 1 << 23 if size == 2 else (1 << 19) // (size - 1)


_LARGEST_COPY = 1 << 26
"""Bytes of the largest message that two ranks exchange by copies: half of a step of 16384 tokens of 4096
numbers. There is room for four."""


@dataclass(slots=True)
class Line:
    """A rank's connection to the others."""

    live: bool = True
    """While it is not, this rank neither sends anything nor waits for anything."""


class Peers:
    """The mailboxes that the ranks' kernels meet in. What fits into `one_shot`'s is summed in one shot."""

    def __init__(self, line: Line, one_shot: Mailbox, two_shot: Mailbox, winners: Mailbox) -> None:
        self._line, self.one_shot, self.two_shot, self._winners = line, one_shot, two_shot, winners

    def serve(self, tensor: Tensor) -> bool:
        """Whether `add` can sum such tensors."""
        layout = self.two_shot.layout
        room = layout.programs * layout.sources * layout.block
        return tensor.numel() <= room and tensor.dtype == layout.dtype

    def add(self, partial: Tensor, residual: Tensor | None = None, squares: Tensor | None = None) -> Tensor:
        """The sum of all ranks' `partial`, added to `residual`, or else in place; its rows' `squares`."""
        layout = self.one_shot.layout
        mailbox = self.one_shot if partial.numel() <= layout.programs * layout.block else self.two_shot
        return all_reduce_triton(partial, mailbox, residual, self._line.live, squares)

    def square_parts(self, width: int) -> int:
        """Parts in which `add` can leave the squares of rows of `width` numbers; 0: it cannot."""
        return square_parts(self.one_shot.layout, width)

    def share(self, first: int, count: int) -> Share:
        """For a draw from logits of the tokens from `first` on."""
        return Share(first, count, self._winners, self._line.live)


def nothing() -> None:
    """It is done."""


@dataclass(frozen=True)
class TensorParallel:
    """A rank and the collectives it takes part in. With one rank every collective is the identity."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """A ProcessGroupGloo or ProcessGroupNCCL (whose stubs lack the collectives); None when `size` is 1."""
    peers: Peers | None = None
    """None: not GPUs, or their memories are out of each other's reach."""
    copies: PeerCopies | None = None
    """With two ranks on GPUs, for what is too large for `peers`."""
    store: Any = None
    """A torch.distributed store that the ranks have in common; None when `size` is 1."""
    advance: Callable[[], None] = nothing
    """Called whenever this rank comes to where it may have to wait for the others."""
    line: Line = field(default_factory=Line, compare=False)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Inside, nothing is exchanged: kernels are launched all the same, and results are garbage."""
        self.line.live = False
        try:
            yield
        finally:
            self.line.live = True

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place. Contiguous."""
        if self.peers is not None and self.peers.serve(tensor):
            return self.peers.add(tensor)
        if self.group is not None and self.line.live:
            self.advance()
            self.group.allreduce([tensor]).wait()
        return tensor

    def room_for_squares(self, partial: Tensor) -> Tensor | None:
        """float32 [parts, rows], for `add_all_reduced` of partial [rows, width]; None: it leaves none."""
        if self.peers is None or not self.peers.serve(partial):
            return None
        parts = self.peers.square_parts(partial.shape[1])
        return partial.new_empty(parts, len(partial), dtype=torch.float32) if parts else None

    def add_all_reduced(
        self, partial: Tensor, residual: Tensor, squares: Tensor | None = None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """Begin `residual += all_reduce(partial)`. What it returns ends it, to be called before `residual` is
        used, and returns what is still to be added, one tensor or two, whose order is not the same on all
        ranks. Until then the device may compute something else.

        `squares`, from `room_for_squares`, is given the sums of the squares of `residual`'s new rows.
        """
        if self.peers is not None and self.peers.serve(partial):
            self.peers.add(partial, residual, squares)
            return tuple
        copies = None if self.copies is None or not self.copies.serve(partial) else self.copies
        if not self.line.live:
            return lambda: (partial,) if copies is None else (partial, partial)
        self.advance()
        if copies is not None:
            receive = copies.exchange(partial)
            return lambda: (partial, receive())
        work = self.group.allreduce([partial])

        def finish() -> tuple[Tensor, ...]:
            work.wait()
            return (partial,)

        return finish

    def all_gather_last(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors (of equal shapes) side by side along the last dimension."""
        if self.group is None:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        if self.line.live:
            self.advance()
            self.group.allgather([parts], [tensor.contiguous()]).wait()
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Rank `src`'s tensor, in place."""
        if self.group is not None and self.line.live:
            self.advance()
            self.group.broadcast(tensor, src).wait()
        return tensor


def check_devices(size: int, found: int) -> None:
    """Raise ConfigError when there are more ranks than GPUs: each needs one to itself."""
    if size > found:
        raise ConfigError(
            f"tensor_parallel_size {size} asks for more GPUs than the {found} that this machine shows",
            parameter="tensor_parallel_size",
            value=size,
            limit=f"<= {found}",
        )


def connect(
    rank: int, size: int, device: torch.device, rendezvous: str, advance: Callable[[], None] = nothing
) -> TensorParallel:
    """Meet the other ranks: over NCCL on CUDA devices, over gloo on CPUs.

    `rendezvous` is the path of a file that all ranks can open and that is empty or does not exist before;
    returns once all `size` ranks have come. `advance`: see `TensorParallel`.
    """
    if size == 1:
        return TensorParallel()
    store = dist.FileStore(rendezvous, size)  # type: ignore[attr-defined]  # the stubs do not export it
    if device.type == "cuda":
        os.environ["NCCL_NVLS_ENABLE"] = "0"  # NVLink multicast: a fault in it takes the whole host along
        # All ranks are on this host: nobody else is to reach them, or their state, which NCCL would tell.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")
        os.environ.setdefault("NCCL_RAS_ENABLE", "0")
        # Before products that are launched at the same time: those fill the GPU, and its peers wait.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        return TensorParallel(rank, size, group, store=store, advance=advance)
    # Without a named interface gloo asks the resolver for this machine's hostname, which may not resolve.
    gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    group = dist.ProcessGroupGloo(store, rank, size, gloo)
    return TensorParallel(rank, size, group, store=store, advance=advance)


def open_mailboxes(
    tp: TensorParallel,
    device: torch.device,
    dtype: torch.dtype,
    max_elements: int,
    max_rows: int,
    max_sum: int,
) -> TensorParallel:
    """`tp` with mailboxes, if its GPUs reach each other's memory. All ranks call it.

    Args:
        dtype: of the model, and so of what is summed.
        max_elements: of a sum in a CUDA graph.
        max_rows: most rows of which tokens are drawn at once.
        max_sum: elements of the largest sum.
    """
    if tp.size == 1 or not peer_memory.can_share(tp.size):
        return tp
    largest = max_elements * dtype.itemsize
    layouts = (
        one_shot_layout(tp.size, min(largest, _largest_in_one_shot(tp.size)), dtype),
        two_shot_layout(tp.size, largest, dtype),
        winners_layout(tp.size, max_rows),
    )
    peers = Peers(tp.line, *share_mailboxes(tp, device, layouts))
    copies = None
    if tp.size == 2:  # with more, a rank would send everything several times
        store = dist.PrefixStore("copies", tp.store)  # type: ignore[attr-defined]  # likewise
        num_bytes = min(max_sum * dtype.itemsize, _LARGEST_COPY)
        copies = PeerCopies(tp.rank, device, num_bytes, store)
    return replace(tp, peers=peers, copies=copies)


def share_mailboxes(tp: TensorParallel, device: torch.device, layouts: Sequence[Layout]) -> list[Mailbox]:
    """Mailboxes of these layouts, in one piece of memory. All ranks call it, once."""
    sizes = [-(-layout.num_bytes // 16) * 16 for layout in layouts]
    memory = peer_memory.allocate(sum(sizes), device)
    for layout, part in zip(layouts, torch.split(memory, sizes), strict=True):
        empty(part, layout.dtype)
    bases = peer_memory.share(memory, tp.rank, tp.size, tp.store)
    offsets = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        make_mailbox(layout, tp.rank, [base + offset for base in bases], device)
        for layout, offset in zip(layouts, offsets, strict=True)
    ]
