"""Root-mean-square norm, with the residual addition that precedes it in a transformer layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous

_PROGRAM_SIZE = 4096
"""Numbers that one program should see at least: short rows (heads) are normed several at a time."""


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """Norm of the rows of `x` [..., size], scaled by `weight` [size]; computed in float32.

    With `update` (the shape of `x`), `x += update` happens first, in place: `x` is the residual stream. With
    `other` too, `x += update + other`, the same whichever of the two is which.
    """
    if x.is_cuda and x.dim() <= 3:
        return rms_norm_triton(x, weight, eps, update, other)
    return rms_norm_reference(x, weight, eps, update, other)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """The same in torch."""
    if update is not None:
        x.copy_(x.float() + (update.float() if other is None else update.float() + other.float()))
    return F.rms_norm(x, weight.shape, weight, eps)


def row_scales(x: Tensor, eps: float) -> Tensor:
    """The factors [rows, 1] by which an RMS norm scales the rows of `x` [rows, size].

    As (x * weight) W^T * scale equals norm(x) W^T, a product can do without a norm before it: see `late` in
    `silu_mul` and `decode_attention`.
    """
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def row_squares(x: Tensor) -> Tensor:
    """Sums of the squares of the rows of `x` [rows, size], float32 [1, rows]."""
    return row_squares_triton(x) if x.is_cuda else x.float().square().sum(-1)[None]


# --- Triton ------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _sum_of_squares(x_ptr, SIZE: tl.constexpr):
    BLOCK: tl.constexpr = 1024
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
        total += x * x
    return tl.sum(total, 0)


@triton.jit  # type: ignore[untyped-decorator]
def row_scale(x_ptr, eps, SIZE: tl.constexpr):  # noqa: ANN201 (a Triton scalar)
    """`row_scales` of one row."""
    return tl.rsqrt(_sum_of_squares(x_ptr, SIZE) / SIZE + eps)


@triton.jit  # type: ignore[untyped-decorator]
def late_scale(  # noqa: ANN201 (a Triton scalar)
    x_ptr, squares_ptr, row, rows, eps, SIZE: tl.constexpr, PARTS: tl.constexpr
):
    """`row_scale` of a row of x [rows, SIZE]; with PARTS by float32 [PARTS, rows] sums of squares."""
    if PARTS:
        AT_ONCE: tl.constexpr = 32
        total = tl.zeros([AT_ONCE], tl.float32)
        for at in tl.static_range(0, PARTS, AT_ONCE):
            part = at + tl.arange(0, AT_ONCE)
            total += tl.load(squares_ptr + part * rows + row, mask=part < PARTS, other=0.0)
        return tl.rsqrt(tl.sum(total, 0) / SIZE + eps)
    else:
        return row_scale(x_ptr + row.to(tl.int64) * SIZE, eps, SIZE)


@triton.jit  # type: ignore[untyped-decorator]
def _row_squares_kernel(x_ptr, squares_ptr, stride, SIZE: tl.constexpr, PDL: tl.constexpr):
    wait_previous(PDL)
    allow_next(PDL)
    row = tl.program_id(0)
    tl.store(squares_ptr + row, _sum_of_squares(x_ptr + row.to(tl.int64) * stride, SIZE))


def row_squares_triton(x: Tensor) -> Tensor:
    """The same in one launch, for dense rows."""
    squares = torch.empty(1, len(x), dtype=torch.float32, device=x.device)
    _row_squares_kernel[(len(x),)](x, squares, x.stride(0), SIZE=x.shape[1], num_warps=4, **pdl_options(x))
    return squares


def rms_norm_triton(
    x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """The same in one launch, for `x` of up to three dimensions, of which only the last must be dense."""
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outer, inner = (x.shape[0], x.shape[1]) if x.dim() == 3 else (x.numel() // size, 1)
    outer_stride = x.stride(0) if x.dim() > 1 else 0
    inner_stride = x.stride(1) if x.dim() == 3 else 0
    assert x.stride(-1) == 1
    updates = [each for each in (update, other) if each is not None]
    assert not updates or all(each.is_contiguous() for each in (x, *updates))
    columns = triton.next_power_of_2(size)
    rows_each = triton.next_power_of_2(min(max(1, _PROGRAM_SIZE // columns), inner))
    _rms_norm_kernel[outer, triton.cdiv(inner, rows_each)](
        x,
        x if update is None else update,
        x if other is None else other,
        weight,
        out,
        inner,
        outer_stride,
        inner_stride,
        size,
        eps,
        ROWS=rows_each,
        COLUMNS=columns,
        UPDATES=len(updates),
        **pdl_options(x),
        num_warps=8 if columns >= 2048 else 4,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm_kernel(
    x_ptr,  # [outer, inner, size]
    update_ptr,  # as x, dense
    other_ptr,  # likewise
    weight_ptr,  # [size]
    out_ptr,  # as x, dense
    inner,
    outer_stride,
    inner_stride,
    size,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPDATES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    outer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < inner) & (column < size)
    place = outer * outer_stride + row * inner_stride + column
    dense = (outer * inner + row) * size + column
    weight = tl.load(weight_ptr + column, mask=column < size, other=0.0).to(tl.float32)
    allow_next(PDL)
    wait_previous(PDL)
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    if UPDATES > 0:
        update = tl.load(update_ptr + dense, mask=inside, other=0.0).to(tl.float32)
        if UPDATES > 1:
            update += tl.load(other_ptr + dense, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + update).to(x.dtype)
        tl.store(x_ptr + place, x, mask=inside)
    values = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=1) / size + eps)[:, None]
    tl.store(out_ptr + dense, values * scale * weight, mask=inside)
