"""Sums over the ranks of a tensor-parallel group, by peer memory, together with the addition that follows.

    residual += partial[0] + ... + partial[size - 1]

One shot: every rank sends all of its partial sums to every other, and each adds them up. Two shots: each rank
adds up a share and sends the result to the others; less is sent, but it takes two journeys. Either way all
ranks add the same numbers in the same order, or take the same sum: their results are equal bit by bit.
The messages are small, tens of kilobytes to a few megabytes; what counts is how soon they arrive.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .jit import tl, triton
from .mailbox import Layout, Mailbox, box_pointers, clear, is_absent, own_pointer, receive, send
from .pdl import allow_next, pdl_options, wait_previous

_BLOCK_BYTES = 512
"""Of one warp's widest store. Programs of one warp need no barriers."""


def one_shot_layout(size: int, num_bytes: int, dtype: torch.dtype) -> Layout:
    """For messages of up to `num_bytes`."""
    return Layout(triton.cdiv(num_bytes, _BLOCK_BYTES), size, _BLOCK_BYTES // dtype.itemsize, dtype)


def two_shot_layout(size: int, num_bytes: int, dtype: torch.dtype) -> Layout:
    """For messages of up to `num_bytes`."""
    programs = triton.cdiv(num_bytes, size * _BLOCK_BYTES)
    return Layout(programs, size, _BLOCK_BYTES // dtype.itemsize, dtype, phases=2)


def all_reduce_reference(partials: Sequence[Tensor], residual: Tensor | None = None) -> Tensor:
    """The result of every rank; not in place."""
    total = torch.stack([partial.float() for partial in partials]).sum(0)
    if residual is not None:
        total += residual.float()
    return total.to(partials[0].dtype)


def all_reduce_triton(
    partial: Tensor, mailbox: Mailbox, residual: Tensor | None = None, live: bool = True
) -> Tensor:
    """Add the sum of all ranks' `partial` to `residual`, in place; without one, to `partial` itself.

    Args:
        partial: contiguous, of the mailbox's dtype, and no larger than the mailbox was made for.
        mailbox: of `one_shot_layout` or `two_shot_layout`, which decides how it is done.
        live: False launches the kernel alone: nothing is sent or awaited, and the result is garbage.

    Returns: the sum.
    """
    layout, elements = mailbox.layout, partial.numel()
    out = partial if residual is None else residual
    two_shot = layout.phases == 2
    programs = triton.cdiv(elements, layout.block * (layout.sources if two_shot else 1))
    assert programs <= layout.programs, f"{elements} numbers for a mailbox of {layout}"
    assert partial.dtype == layout.dtype
    assert partial.is_contiguous()
    assert out.is_contiguous()
    kernel = _two_shot_kernel if two_shot else _one_shot_kernel
    kernel[(programs,)](
        partial,
        out,
        mailbox.addresses,
        mailbox.turns,
        elements,
        int(live),
        RANK=mailbox.rank,
        SIZE=layout.sources,
        WIDTH=triton.next_power_of_2(layout.sources),
        BLOCK=layout.block,
        ADD=residual is not None,
        num_warps=layout.block * layout.dtype.itemsize // _BLOCK_BYTES,
        **pdl_options(partial),
    )
    return out


@triton.jit
def _sendable(x):
    """Negative zero is a number that has not come."""
    return tl.where(is_absent(x), 0.0, x)


@triton.jit
def _arrived(
    own,
    place,
    out_pointers,
    inside,
    live,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What all ranks have sent to `place`, added up, with ADD to what stands in `out_pointers`. [BLOCK]"""
    total = tl.zeros([BLOCK], tl.float32)
    if ADD:
        total = tl.load(out_pointers, mask=inside, other=0.0).to(tl.float32)
    return total + tl.sum(receive(own, place, inside[None, :], live, BLOCK, SIZE, WIDTH).to(tl.float32), 0)


@triton.jit(do_not_specialize=["live"])
def _one_shot_kernel(
    partial_ptr,  # [elements]
    out_ptr,  # [elements]; with ADD what is added to
    addresses_ptr,
    turns_ptr,
    elements,
    live,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    BOX: tl.constexpr = SIZE * BLOCK
    program = tl.program_id(0)
    element = program * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    allow_next(PDL)
    boxes = box_pointers(addresses_ptr, dtype, SIZE, WIDTH)
    own = own_pointer(addresses_ptr, dtype, RANK)
    wait_previous(PDL)
    turn = tl.load(turns_ptr + program)
    x = tl.load(partial_ptr + element, mask=inside, other=0.0)
    first = program.to(tl.int64) * (3 * BOX)
    here = first + turn * BOX
    send(boxes, here + RANK * BLOCK, _sendable(x)[None, :], inside[None, :], live, SIZE, WIDTH)
    clear(own, first + (turn + 2) % 3 * BOX, BLOCK, SIZE, WIDTH)
    total = _arrived(own, here, out_ptr + element, inside, live, ADD, BLOCK, SIZE, WIDTH)
    # Not earlier: were there several warps, a slow one might not have read it.
    tl.store(turns_ptr + program, (turn + live) % 3)
    tl.store(out_ptr + element, total.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["live"])
def _two_shot_kernel(
    partial_ptr,  # [elements]
    out_ptr,  # [elements]; with ADD what is added to
    addresses_ptr,
    turns_ptr,
    elements,
    live,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    BOX: tl.constexpr = SIZE * BLOCK
    program = tl.program_id(0)
    rank = tl.arange(0, WIDTH)[:, None]
    element = (program * SIZE + rank) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (element < elements) & (rank < SIZE)
    mine = (program * SIZE + RANK) * BLOCK + tl.arange(0, BLOCK)
    in_mine = mine < elements
    allow_next(PDL)
    boxes = box_pointers(addresses_ptr, dtype, SIZE, WIDTH)
    own = own_pointer(addresses_ptr, dtype, RANK)
    wait_previous(PDL)
    turn = tl.load(turns_ptr + program)
    x = tl.load(partial_ptr + element, mask=inside, other=0.0)
    first = program.to(tl.int64) * (6 * BOX)
    here = first + turn * (2 * BOX)
    before = first + (turn + 2) % 3 * (2 * BOX)
    send(boxes, here + RANK * BLOCK, _sendable(x), inside, live, SIZE, WIDTH)
    clear(own, before, BLOCK, SIZE, WIDTH)
    clear(own, before + BOX, BLOCK, SIZE, WIDTH)
    total = _arrived(own, here, out_ptr + mine, in_mine, live, ADD, BLOCK, SIZE, WIDTH)
    tl.store(turns_ptr + program, (turn + live) % 3)
    result = _sendable(total.to(dtype))
    send(boxes, here + BOX + RANK * BLOCK, result[None, :], in_mine[None, :], live, SIZE, WIDTH)
    tl.store(out_ptr + element, receive(own, here + BOX, inside, live, BLOCK, SIZE, WIDTH), mask=inside)
