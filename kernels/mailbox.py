"""Mailboxes: memory of every rank into which all ranks write, so that one kernel meets its peers' kernels.

A number that has not come is a number that is never sent: negative zero (of integers, the smallest). So
numbers announce themselves; there are no flags, no fences and no counters that the host would have to know,
and a launch can stand in a CUDA graph. A program of a kernel exchanges with the same program of the peers'
kernels and with nobody else, in the order of launches, which must be the same on all ranks.

A program has three boxes and uses them in turn. While it uses one it empties the one before: its peers write
there again two exchanges later, and they are that far only when this rank has sent the exchange in between.
The kernel of an exchange must therefore end before the next one sends, as kernels of one stream do.

Waiting is a loop in the kernel. If a peer never comes it ends with the process.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .jit import tl, triton

TURNS = 3


class Layout(NamedTuple):
    """What a kernel's mailbox holds: [programs, TURNS, phases, sources, block]."""

    programs: int
    sources: int
    block: int
    """Numbers that a program sends to a peer at once."""
    dtype: torch.dtype
    phases: int = 1

    @property
    def num_bytes(self) -> int:
        return self.programs * TURNS * self.phases * self.sources * self.block * self.dtype.itemsize


class Mailbox(NamedTuple):
    """One kernel's mailboxes as one rank sees them."""

    layout: Layout
    rank: int
    addresses: Tensor
    """int64 [sources], on the device: where each rank's memory of this layout begins."""
    turns: Tensor
    """int32 [programs], the box that each program uses next."""


_ABSENT = {2: (torch.int16, -(2**15)), 4: (torch.int32, -(2**31)), 8: (torch.int64, -(2**63))}


def make_mailbox(layout: Layout, rank: int, addresses: list[int], device: torch.device) -> Mailbox:
    """`addresses`: of memory that `empty` has prepared."""
    return Mailbox(
        layout,
        rank,
        torch.tensor(addresses, dtype=torch.int64, device=device),
        torch.zeros(layout.programs, dtype=torch.int32, device=device),
    )


def empty(memory: Tensor, dtype: torch.dtype) -> None:
    """Nothing has come yet. Must be done before any peer learns of `memory`."""
    kind, absent = _ABSENT[dtype.itemsize]
    memory.view(kind).fill_(absent)


# --- for kernels -------------------------------------------------------------------------------------


@triton.jit
def is_absent(x) -> tl.tensor:
    """Where `x` has not come."""
    if x.dtype.primitive_bitwidth == 64:
        return x == -9223372036854775808
    elif x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True) == -2147483648
    else:
        return x.to(tl.int16, bitcast=True) == -32768


@triton.jit
def absent(ROWS: tl.constexpr, COLUMNS: tl.constexpr, dtype: tl.constexpr) -> tl.tensor:
    """[ROWS, COLUMNS] of what is never sent."""
    if dtype.primitive_bitwidth == 64:
        return tl.full([ROWS, COLUMNS], -9223372036854775808, tl.int64)
    elif dtype.primitive_bitwidth == 32:
        return tl.full([ROWS, COLUMNS], -2147483648, tl.int32).to(dtype, bitcast=True)
    else:
        return tl.full([ROWS, COLUMNS], -32768, tl.int16).to(dtype, bitcast=True)


@triton.jit
def box_pointers(addresses_ptr, dtype: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Where each rank's mailbox begins: pointers [WIDTH, 1], of which SIZE exist."""
    rank = tl.arange(0, WIDTH)
    address = tl.load(addresses_ptr + rank, mask=rank < SIZE, other=0)
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), [16])[:, None]


@triton.jit
def own_pointer(addresses_ptr, dtype: tl.constexpr, RANK: tl.constexpr) -> tl.tensor:
    """Where this rank's mailbox begins."""
    return tl.multiple_of(tl.load(addresses_ptr + RANK).to(tl.pointer_type(dtype)), 16)


@triton.jit
def send(boxes, place, x, inside, live, SIZE: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """Write x [WIDTH or 1, BLOCK], where `inside`, at `place` (an offset) of every rank's mailbox."""
    rank = tl.arange(0, WIDTH)[:, None]
    column = tl.arange(0, x.shape[1])[None, :]
    tl.store(boxes + place + column, x, mask=(rank < SIZE * live) & inside)


@triton.jit
def receive(
    own, place, inside, live, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tensor:
    """Wait for what all ranks have sent to `place`: [WIDTH, BLOCK], zero outside `inside`."""
    rank = tl.arange(0, WIDTH)[:, None]
    pointers = own + place + rank * BLOCK + tl.arange(0, BLOCK)[None, :]
    expected = (rank < SIZE) & inside
    x = tl.load(pointers, mask=expected, other=0, volatile=True)
    missing = tl.max(tl.max(is_absent(x).to(tl.int32), 1), 0)
    while missing * live > 0:
        x = tl.load(pointers, mask=expected, other=0, volatile=True)
        missing = tl.max(tl.max(is_absent(x).to(tl.int32), 1), 0)
    return x


@triton.jit
def clear(own, place, used, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr) -> None:
    """Empty the box at `place`, where it is ever `used`."""
    rank = tl.arange(0, WIDTH)[:, None]
    pointers = own + place + rank * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(pointers, absent(WIDTH, BLOCK, own.dtype.element_ty), mask=(rank < SIZE) & used)
