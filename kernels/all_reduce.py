"""Sums over the ranks of a tensor-parallel group, by peer memory, together with the addition that follows.

    residual += partial[0] + ... + partial[size - 1]

One shot: every rank sends all of its partial sums to every other, and each adds them up. Two shots: each rank
adds up a share and sends the result to the others; less is sent, but it takes two journeys. Either way all
ranks add the same numbers in the same order, or take the same sum: their results are equal bit by bit.
The messages are small, tens of kilobytes to a few megabytes; what counts is how soon they arrive. What a rank
has itself never goes through its mailbox.

The result can come with the sums of its rows' squares, for a norm that follows.
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


def square_parts(layout: Layout, width: int) -> int:
    """Parts in which a sum of rows of `width` numbers can leave their squares; 0: it cannot."""
    return 0 if width % layout.block else width // layout.block


def all_reduce_triton(
    partial: Tensor,
    mailbox: Mailbox,
    residual: Tensor | None = None,
    live: bool = True,
    squares: Tensor | None = None,
) -> Tensor:
    """Add the sum of all ranks' `partial` to `residual`, in place; without one, to `partial` itself.

    Args:
        partial: contiguous, of the mailbox's dtype, and no larger than the mailbox was made for.
        mailbox: of `one_shot_layout` or `two_shot_layout`, which decides how it is done.
        live: False launches the kernel alone: nothing is sent or awaited, and the result is garbage.
        squares: float32 [`square_parts(layout, width)`, rows], of `partial` [rows, width]: is given the sums
            of the squares of the result's rows, part by part.

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
    parts = 0
    if squares is not None:
        parts = square_parts(layout, partial.shape[-1])
        assert parts > 0
        assert squares.shape == (parts, elements // partial.shape[-1])
        assert squares.is_contiguous()
    kernel = _two_shot_kernel if two_shot else _one_shot_kernel
    kernel[(programs,)](
        partial,
        out,
        partial if squares is None else squares,
        mailbox.addresses,
        mailbox.turns,
        elements,
        int(live),
        RANK=mailbox.rank,
        SIZE=layout.sources,
        WIDTH=triton.next_power_of_2(layout.sources),
        BLOCK=layout.block,
        ADD=residual is not None,
        PARTS=parts,
        num_warps=layout.block * layout.dtype.itemsize // _BLOCK_BYTES,
        **pdl_options(partial),
    )
    return out


@triton.jit
def _sendable(x):
    """Negative zero is a number that has not come."""
    return tl.where(is_absent(x), 0.0, x)


@triton.jit
def _added_to(out_pointers, inside, ADD: tl.constexpr):
    """What a sum is added to, float32."""
    if ADD:
        return tl.load(out_pointers, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.zeros(inside.shape, tl.float32)


@triton.jit
def _sum(ours, theirs, is_peer):
    """Over the ranks, in their order: float32 [BLOCK]. `ours`: [1 or WIDTH, BLOCK], for where no peer is."""
    return tl.sum(tl.where(is_peer, theirs, ours).to(tl.float32), 0)


@triton.jit
def _leave_squares(squares_ptr, result, block, exists, elements, PARTS: tl.constexpr):
    """Of result [n, BLOCK], the blocks `block` [n, 1] of rows of PARTS blocks each."""
    rows = elements // (PARTS * result.shape[1])
    x = result.to(tl.float32)
    place = squares_ptr + block % PARTS * rows + block // PARTS
    tl.store(place, tl.sum(x * x, 1)[:, None], mask=exists)


@triton.jit(do_not_specialize=["live"])
def _one_shot_kernel(
    partial_ptr,  # [elements]
    out_ptr,  # [elements]; with ADD what is added to
    squares_ptr,  # float32 [PARTS, rows]
    addresses_ptr,
    turns_ptr,
    elements,
    live,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,  # blocks of a row; 0: no squares
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    BOX: tl.constexpr = SIZE * BLOCK
    program = tl.program_id(0)
    element = program * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    is_peer = tl.arange(0, WIDTH)[:, None] != RANK
    theirs = inside[None, :] & is_peer
    allow_next(PDL)
    boxes = box_pointers(addresses_ptr, dtype, SIZE, WIDTH)
    own = own_pointer(addresses_ptr, dtype, RANK)
    wait_previous(PDL)
    turn = tl.load(turns_ptr + program)
    x = _sendable(tl.load(partial_ptr + element, mask=inside, other=0.0))[None, :]
    first = program.to(tl.int64) * (3 * BOX)
    here = first + turn * BOX
    send(boxes, here + RANK * BLOCK, x, theirs, live, SIZE, WIDTH)
    clear(own, first + (turn + 2) % 3 * BOX, is_peer, BLOCK, SIZE, WIDTH)
    before = _added_to(out_ptr + element, inside, ADD)
    received = receive(own, here, theirs, live, BLOCK, SIZE, WIDTH)
    result = (before + _sum(x, received, is_peer)).to(dtype)
    # Not earlier: were there several warps, a slow one might not have read it.
    tl.store(turns_ptr + program, (turn + live) % 3)
    tl.store(out_ptr + element, result, mask=inside)
    if PARTS:
        block = program + tl.zeros([1, 1], tl.int32)
        _leave_squares(squares_ptr, result[None, :], block, block >= 0, elements, PARTS)


@triton.jit(do_not_specialize=["live"])
def _two_shot_kernel(
    partial_ptr,  # [elements]
    out_ptr,  # [elements]; with ADD what is added to
    squares_ptr,  # float32 [PARTS, rows]
    addresses_ptr,
    turns_ptr,
    elements,
    live,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,  # blocks of a row; 0: no squares
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    BOX: tl.constexpr = SIZE * BLOCK
    program = tl.program_id(0)
    rank = tl.arange(0, WIDTH)[:, None]
    block = program * SIZE + rank
    element = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (element < elements) & (rank < SIZE)
    mine = (program * SIZE + RANK) * BLOCK + tl.arange(0, BLOCK)
    in_mine = mine < elements
    is_peer = rank != RANK
    allow_next(PDL)
    boxes = box_pointers(addresses_ptr, dtype, SIZE, WIDTH)
    own = own_pointer(addresses_ptr, dtype, RANK)
    wait_previous(PDL)
    turn = tl.load(turns_ptr + program)
    x = _sendable(tl.load(partial_ptr + element, mask=inside, other=0.0))
    first = program.to(tl.int64) * (6 * BOX)
    here = first + turn * (2 * BOX)
    last = first + (turn + 2) % 3 * (2 * BOX)
    send(boxes, here + RANK * BLOCK, x, inside & is_peer, live, SIZE, WIDTH)
    clear(own, last, is_peer, BLOCK, SIZE, WIDTH)
    clear(own, last + BOX, is_peer, BLOCK, SIZE, WIDTH)
    theirs = in_mine[None, :] & is_peer
    before = _added_to(out_ptr + mine, in_mine, ADD)
    received = receive(own, here, theirs, live, BLOCK, SIZE, WIDTH)
    total = before + _sum(x, received, is_peer)
    tl.store(turns_ptr + program, (turn + live) % 3)
    ours = _sendable(total.to(dtype))[None, :]
    send(boxes, here + BOX + RANK * BLOCK, ours, theirs, live, SIZE, WIDTH)
    received = receive(own, here + BOX, inside & is_peer, live, BLOCK, SIZE, WIDTH)
    result = tl.where(is_peer, received, ours)
    tl.store(out_ptr + element, result, mask=inside)
    if PARTS:
        exists = (rank < SIZE) & (block * BLOCK < elements)
        _leave_squares(squares_ptr, result, block, exists, elements, PARTS)
