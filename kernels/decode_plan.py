"""The work of a decode step's attention, cut into pieces of about equal length: once per step, on the device.

Every layer then launches a fixed grid over the pieces, whatever the contexts, so that the launch can stand in
a CUDA graph and no program has much more to do than another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous

_GRAIN = 64
"""Pieces are multiples of so many tokens."""
_COLUMNS = 8
"""Of a piece: row, block table's row, first token, end, sequence length, the row's first piece, its pieces;
and one to spare, so that it is one sector of 32 bytes."""
MANY_ROWS = 129
"""Rows from which they are mostly left whole, whatever their heads (see `leaves_whole`)."""
_LONG, _MOST, _LEAST = 1024, 792, 264
"""Of rows left whole: tokens of the longest piece; more if over _MOST programs were added to one for each,
less (but 256) if all rows in such pieces were under _LEAST."""


class DecodePlan(NamedTuple):
    """A step's pieces and the room for their results. One serves all layers, and all steps up to its size."""

    work: Tensor
    """int32 [pieces, _COLUMNS]; a row of -1 marks a piece that does not exist."""
    partial: Tensor
    """float32 [pieces, heads, head_dim], weighted values of a piece."""
    stats: Tensor
    """float32 [pieces, heads, 2], largest score and sum of a piece, to base 2."""
    arrivals: Tensor
    """int32 [rows, kv_heads], finished pieces; zero between launches."""
    programs: int = 528
    """To aim at with few rows of long context: 4 for each of an H200's 132 multiprocessors."""
    min_piece: int = 128
    """Tokens below which a row is not cut while rows alone are not a program for each multiprocessor."""

    @classmethod
    def empty(
        cls,
        rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        programs: int = 528,
        min_piece: int = 128,
    ) -> DecodePlan:
        """For steps of at most `rows` rows."""
        pieces = rows - (-max(_target(rows, kv_heads, programs), _MOST) // kv_heads)
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return cls(
            work=torch.full((pieces, _COLUMNS), -1, dtype=torch.int32, device=device),
            partial=torch.empty(pieces, heads, head_dim, **floats),
            stats=torch.empty(pieces, heads, 2, **floats),
            arrivals=torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
            programs=programs,
            min_piece=min_piece,
        )

    def pieces_each(self, rows: int) -> int:
        """Pieces that a key-value head aims at. Every row may have one more, its remainder."""
        kv_heads = self.arrivals.shape[1]
        if leaves_whole(rows, kv_heads):
            return -(-_MOST // kv_heads)
        return -(-_target(rows, kv_heads, self.programs) // kv_heads)

    def max_pieces(self, rows: int) -> int:
        """Most pieces that a step of `rows` rows can have."""
        return rows + self.pieces_each(rows)


def _target(rows: int, kv_heads: int, programs: int) -> int:
    """Programs to aim at. Pieces of half the mean context even out different lengths."""
    return programs + 2 * rows * kv_heads


def is_small(rows: int, kv_heads: int) -> bool:
    """Rows alone do not fill the GPU: latency counts, not bandwidth."""
    return rows * kv_heads < _LEAST


def leaves_whole(rows: int, kv_heads: int) -> bool:
    """Rows are mostly left whole, and the longest pieces come first: many rows, and those that alone are one
    program for each multiprocessor, but not two.

    A piece costs its stores and the combination, 6 to 20 per cent for pieces of 300 tokens.
    """
    return rows >= MANY_ROWS or (rows > 16 and 128 <= rows * kv_heads < _LEAST)


def plan_decode(plan: DecodePlan, seq_lens: Tensor, table_rows: Tensor | None = None) -> None:
    """Cut the rows into pieces. All on the device.

    Args:
        seq_lens: int32 [rows], with the new token; 0 for a row to be left out (its output is undefined).
        table_rows: int32 [rows], where in the block tables each row stands; None: row i at i.
    """
    rows, kv_heads = len(seq_lens), plan.arrivals.shape[1]
    if leaves_whole(rows, kv_heads):
        _plan_whole_rows(plan, seq_lens, table_rows)
        return
    _plan_kernel[(1,)](
        seq_lens,
        seq_lens if table_rows is None else table_rows,
        plan.work,
        rows,
        plan.max_pieces(rows),
        plan.pieces_each(rows),
        plan.min_piece if rows * kv_heads < 132 else 256,
        GRAIN=_GRAIN,
        COLUMNS=_COLUMNS,
        ROWS=triton.next_power_of_2(rows),
        HAS_TABLE_ROWS=table_rows is not None,
        num_warps=8,
        **pdl_options(seq_lens),
    )


# Not by alignments: see `slot_table`.
@triton.jit(do_not_specialize_on_alignment=["num_rows", "max_pieces", "target"])
def _plan_kernel(
    seq_lens_ptr,
    table_rows_ptr,
    work_ptr,
    num_rows,
    max_pieces,
    target,
    min_piece,
    GRAIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_previous(PDL)
    allow_next(PDL)
    row = tl.arange(0, ROWS)
    seq_len = tl.load(seq_lens_ptr + row, mask=row < num_rows, other=0)
    table_row = row
    if HAS_TABLE_ROWS:
        table_row = tl.load(table_rows_ptr + row, mask=row < num_rows, other=0)
    wanted = tl.cdiv(tl.sum(seq_len, 0), target)
    piece = tl.maximum(tl.cdiv(wanted, GRAIN) * GRAIN, min_piece)
    pieces = tl.cdiv(seq_len, piece)
    first = tl.cumsum(pieces, 0) - pieces
    total = tl.sum(pieces, 0)
    for at in range(0, tl.max(pieces, 0), 16):
        number = at + tl.arange(0, 16)[None, :]
        exists = number < pieces[:, None]
        start = number * piece
        place = work_ptr + (first[:, None] + number) * COLUMNS
        tl.store(place, tl.broadcast_to(row[:, None], ROWS, 16), mask=exists)
        tl.store(place + 1, tl.broadcast_to(table_row[:, None], ROWS, 16), mask=exists)
        tl.store(place + 2, tl.broadcast_to(start, ROWS, 16), mask=exists)
        tl.store(place + 3, tl.minimum(start + piece, seq_len[:, None]), mask=exists)
        tl.store(place + 4, tl.broadcast_to(seq_len[:, None], ROWS, 16), mask=exists)
        tl.store(place + 5, tl.broadcast_to(first[:, None], ROWS, 16), mask=exists)
        tl.store(place + 6, tl.broadcast_to(pieces[:, None], ROWS, 16), mask=exists)
    for at in range(total, max_pieces, 1024):
        place = at + tl.arange(0, 1024)
        tl.store(work_ptr + place * COLUMNS, tl.full([1024], -1, tl.int32), mask=place < max_pieces)


def _plan_whole_rows(plan: DecodePlan, seq_lens: Tensor, table_rows: Tensor | None) -> None:
    rows = len(seq_lens)
    _plan_whole_rows_kernel[(rows,)](
        seq_lens,
        seq_lens if table_rows is None else table_rows,
        plan.work,
        rows,
        plan.max_pieces(rows),
        plan.pieces_each(rows),
        -(-_LEAST // plan.arrivals.shape[1]),
        LONG=_LONG,
        GRAIN=_GRAIN,
        COLUMNS=_COLUMNS,
        ROWS=triton.next_power_of_2(rows),
        HAS_TABLE_ROWS=table_rows is not None,
        num_warps=4,
        **pdl_options(seq_lens),
    )


@triton.jit(do_not_specialize_on_alignment=["num_rows", "max_pieces", "most"])
def _plan_whole_rows_kernel(
    seq_lens_ptr,
    table_rows_ptr,
    work_ptr,
    num_rows,
    max_pieces,
    most,
    least,
    LONG: tl.constexpr,
    GRAIN: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_TABLE_ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row. A row's pieces are equal; rows stand in the order of their pieces' length."""
    wait_previous(PDL)
    allow_next(PDL)
    mine = tl.program_id(0)
    row = tl.arange(0, ROWS)
    seq_len = tl.load(seq_lens_ptr + row, mask=row < num_rows, other=0)
    total = tl.sum(seq_len, 0)
    longest = tl.maximum(tl.minimum(tl.cdiv(total, least), LONG), 256)
    longest = tl.maximum(longest, tl.cdiv(total, most))
    piece = tl.cdiv(tl.cdiv(seq_len, tl.maximum(tl.cdiv(seq_len, longest), 1)), GRAIN) * GRAIN
    pieces = tl.cdiv(seq_len, tl.maximum(piece, 1))
    is_mine = row == mine
    my_len = tl.sum(tl.where(is_mine, seq_len, 0), 0)
    my_piece = tl.sum(tl.where(is_mine, piece, 0), 0)
    my_pieces = tl.sum(tl.where(is_mine, pieces, 0), 0)
    before = (piece > my_piece) | ((piece == my_piece) & (row < mine))
    first = tl.sum(tl.where(before, pieces, 0), 0)
    table_row = mine
    if HAS_TABLE_ROWS:
        table_row = tl.load(table_rows_ptr + mine)
    one = tl.full([64], 1, tl.int32)
    for at in range(0, my_pieces, 64):
        number = at + tl.arange(0, 64)
        place = work_ptr + (first + number) * COLUMNS
        exists = number < my_pieces
        tl.store(place, one * mine, mask=exists)
        tl.store(place + 1, one * table_row, mask=exists)
        tl.store(place + 2, number * my_piece, mask=exists)
        tl.store(place + 3, tl.minimum((number + 1) * my_piece, my_len), mask=exists)
        tl.store(place + 4, one * my_len, mask=exists)
        tl.store(place + 5, one * first, mask=exists)
        tl.store(place + 6, one * my_pieces, mask=exists)
    for at in range(tl.sum(pieces, 0) + mine, max_pieces, num_rows):
        tl.store(work_ptr + at * COLUMNS, -1)
