"""The linear layers of prompts, hundreds to many thousands of tokens, by Hopper's warpgroup instructions.

    y = s * x W^T + b,   r += x W^T + b,   y = silu(s * x G^T) * (s * x U^T)

with W = [G; U] and s the scale of x's RMS norm, whose weight is in W already. What surrounds a product is
done while its results are in registers: neither the gate's wide input nor a normed x goes through memory.

A product of so many tokens is bound by arithmetic. One program runs on each processor and computes tiles of
some tokens and some rows of W, one after the other. One of its warps does nothing but bring the
tiles' columns into a ring in shared memory by bulk copies, and goes on to the next tile while this one is
finished; two warp groups multiply. Neighbouring tiles are computed at about the same
time, so that what they share comes from the second-level cache (see `_place`).

Results leave through shared memory by bulk copies as well, some columns at a time. Sums are always added in
the same order.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .hopper import (
    AVAILABLE,
    descriptor,
    fence_async_shared,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    multiplies,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .pdl import pdl_options


class Tiling(NamedTuple):
    """A tile, and the ring through which its columns come."""

    tokens: int
    rows: int
    """Of W: 128 or 256; gated: half of them the gate's."""
    stages: int
    turns: bool = False
    """The warp groups have tiles of their own, and one finishes its while the other multiplies; else each has
    half of a tile's tokens."""
    beside: int = 8
    """Tiles of tokens that are computed at about the same time."""


MIN_TOKENS = 257
"""Smallest step; with fewer, `medium_batch_linear` or cuBLAS multiplies."""
_BLOCK_K = 64
_COLUMNS = 64
"""Of a result that are stored at once."""
_WARPS = 4
"""Of a group."""
_PROCESSORS = 132


@cache
def tiling(tokens: int, out_features: int, in_features: int, gated: bool = False) -> Tiling | None:
    """How to multiply so many tokens with a matrix; None where cuBLAS should."""
    if not AVAILABLE or tokens < MIN_TOKENS or in_features < 4 * _BLOCK_K:
        return None
    if in_features % 8 or out_features % 8:  # bulk copies want rows that start at multiples of 16 bytes
        return None
    return Tiling(128, 256, 4)


def chosen(x: Tensor, weight: Tensor, gated: bool = False) -> Tiling | None:
    """The tiling for x [tokens, in_features]; None where this kernel cannot or should not multiply."""
    if not multiplies(x, weight):
        return None
    out_features = len(weight) // 2 if gated else len(weight)
    return tiling(len(x), out_features, x.shape[1], gated)


def parts_of(tiling: Tiling, out_features: int) -> int:
    """Parts in which a product leaves the sums of its results' squares."""
    return -(-out_features // tiling.rows)


@gluon.jit
def _place(number, token_tiles, row_tiles, beside):
    """Which tile of the tokens and which of the rows: `beside` tokens' tiles with all rows, then the next."""
    group = number // (beside * row_tiles)
    height = gl.minimum(token_tiles - group * beside, beside)
    within = number - group * (beside * row_tiles)
    return group * beside + within % height, within // height


@gluon.jit
def _bring_tiles(x_desc, weight_desc, ring, token_tiles, row_tiles, beside, steps, N, GATED: gl.constexpr):
    """One warp's work: the columns of this program's tiles, as soon as there is room for them."""
    x, weights, full, empty = ring
    STAGES: gl.constexpr = x.shape[0]
    TOKENS: gl.constexpr = x.shape[1]
    BLOCK_K: gl.constexpr = x.shape[2]
    ROWS: gl.constexpr = weights.shape[1]
    OUTPUTS: gl.constexpr = ROWS // 2 if GATED else ROWS
    stage = 0
    phase = 1
    for number in range(gl.program_id(0), token_tiles * row_tiles, gl.num_programs(0)):
        token_tile, row_tile = _place(number, token_tiles, row_tiles, beside)
        row = row_tile * OUTPUTS
        for step in range(steps):
            k = step * BLOCK_K
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (ROWS + TOKENS) * BLOCK_K * 2)
            tma.async_copy_global_to_shared(x_desc, [token_tile * TOKENS, k], bar, x.index(stage))
            tile = weights.index(stage)
            if GATED:  # as many of the gate's rows above the same of up
                tma.async_copy_global_to_shared(weight_desc, [row, k], bar, tile.slice(0, OUTPUTS))
                tma.async_copy_global_to_shared(weight_desc, [N + row, k], bar, tile.slice(OUTPUTS, OUTPUTS))
            else:
                tma.async_copy_global_to_shared(weight_desc, [row, k], bar, tile)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _multiply_tiles(
    who: gl.constexpr,
    out_desc,
    bias_ptr,
    residual_ptr,
    parts_ptr,
    squares_ptr,
    ring,
    outs,
    token_tiles,
    row_tiles,
    beside,
    steps,
    tokens,
    N,
    K,
    parts,
    eps,
    GATED: gl.constexpr,
    PARTS: gl.constexpr,
    SQUARES: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    TURNS: gl.constexpr,
    WARPS: gl.constexpr,
):
    """A warp group's work: its tokens of this program's tiles, or its tiles."""
    x, weights, full, empty = ring
    STAGES: gl.constexpr = x.shape[0]
    TOKENS: gl.constexpr = x.shape[1]
    ROWS: gl.constexpr = weights.shape[1]
    OUTPUTS: gl.constexpr = ROWS // 2 if GATED else ROWS
    OWN: gl.constexpr = TOKENS if TURNS else TOKENS // 2
    FIRST: gl.constexpr = 0 if TURNS else who * OWN
    EVERY: gl.constexpr = 2 if TURNS else 1
    START: gl.constexpr = who if TURNS else 0
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, ROWS, 16]
    )
    programs = gl.num_programs(0)
    done = START * steps
    for number in range(gl.program_id(0) + START * programs, token_tiles * row_tiles, EVERY * programs):
        token_tile, row_tile = _place(number, token_tiles, row_tiles, beside)
        token = token_tile * TOKENS + FIRST + gl.arange(0, OWN, layout=gl.SliceLayout(1, ACC))
        stage = done % STAGES
        phase = (done // STAGES) & 1
        done += EVERY * steps
        sums = gl.zeros([OWN, ROWS], gl.float32, ACC)
        for step in range(steps):
            mbarrier.wait(full.index(stage), phase)
            mine = x.index(stage).slice(FIRST, OWN)
            sums = warpgroup_mma(mine, weights.index(stage).permute((1, 0)), sums, is_async=True)
            # The product before this one has ended in all warps: its place in the ring takes new columns.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            gl.thread_barrier()
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=step > 0)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        # While the last product is computed:
        if PARTS > 0:
            scale = _scales(parts_ptr, token, tokens, parts, K, eps, PARTS)
        if HAS_RESIDUAL:
            column = row_tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, ACC))
            place = token[:, None] * N + column[None, :]
            inside = (token < tokens)[:, None] & (column < N)[None, :]
            residual = gl.load(residual_ptr + place, mask=inside, other=0.0)
        sums = warpgroup_mma_wait(0, deps=(sums,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
        if GATED:
            gate, up = gl.split(gl.permute(gl.reshape(sums, [OWN, 2, OUTPUTS]), [0, 2, 1]))
            EACH: gl.constexpr = gl.SliceLayout(1, gate.type.layout)
            scale = gl.convert_layout(scale, EACH) if PARTS > 0 else gl.full([OWN], 1.0, gl.float32, EACH)
            sums = gate * up * (scale * scale)[:, None] * _sigmoid(gate * scale[:, None])
        elif PARTS > 0:
            sums = sums * scale[:, None]
        if HAS_BIAS:
            column = row_tile * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(0, ACC))
            sums += gl.load(bias_ptr + column, mask=column < N, other=0.0).to(gl.float32)[None, :]
        if HAS_RESIDUAL:
            sums += residual.to(gl.float32)
        rounded = sums.to(out_desc.dtype)
        if SQUARES:
            again = rounded.to(gl.float32)
            gl.store(squares_ptr + row_tile * tokens + token, gl.sum(again * again, 1), mask=token < tokens)
        PENDING: gl.constexpr = 1 if outs.shape[2] < OUTPUTS else 0
        _leave(out_desc, outs, 2 * who, rounded, token_tile * TOKENS + FIRST, row_tile * OUTPUTS, PENDING)
    tma.store_wait(0)


@gluon.jit
def _scales(squares_ptr, token, tokens, parts, K, eps, PARTS: gl.constexpr):
    """Of x's norm, from the sums of squares of at most `PARTS` parts."""
    LAYOUT: gl.constexpr = token.type.layout
    total = gl.zeros([token.shape[0]], gl.float32, LAYOUT)
    for i in gl.static_range(PARTS):
        inside = (token < tokens) & (i < parts)
        total += gl.load(squares_ptr + i * tokens + token, mask=inside, other=0.0)
    return gl.rsqrt(total / K + eps)


@gluon.jit
def _sigmoid(x):
    """By the hardware's approximations, which are far closer than bfloat16."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=f,f",
        [x * -1.4426950408889634],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _leave(out_desc, outs, buffer: gl.constexpr, values, token, column, PENDING: gl.constexpr):
    """Store `values` some columns at a time, through this buffer and the next in turns."""
    COLUMNS: gl.constexpr = values.shape[1]
    if outs.shape[2] == COLUMNS:
        # What is still being read is the other buffer.
        tma.store_wait(PENDING)
        gl.thread_barrier()
        outs.index(buffer).store(values)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out_desc, [token, column], outs.index(buffer))
    else:
        HALF: gl.constexpr = COLUMNS // 2
        left, right = gl.split(gl.permute(gl.reshape(values, [values.shape[0], 2, HALF]), [0, 2, 1]))
        OTHER: gl.constexpr = buffer ^ 1 if outs.shape[2] == HALF else buffer
        _leave(out_desc, outs, buffer, left, token, column, PENDING)
        _leave(out_desc, outs, OTHER, right, token, column + HALF, PENDING)


@gluon.jit(do_not_specialize=["tokens", "parts", "beside"])
def _large_batch_kernel(
    x_desc,  # [tokens, K]
    weight_desc,  # [N, K]; gated: [2 * N, K]
    out_desc,  # [tokens, N]
    bias_ptr,  # [N]
    residual_ptr,  # [tokens, N]; may be what out_desc describes
    parts_ptr,  # float32 [parts, tokens], sums of x's squares
    squares_ptr,  # float32 [row tiles, tokens], sums of the results' squares
    tokens,
    N,
    K,
    parts,
    beside,
    eps,
    GATED: gl.constexpr,
    PARTS: gl.constexpr,  # at least `parts`; 0: no norm
    SQUARES: gl.constexpr,  # leave the results' squares
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    TURNS: gl.constexpr,
    COLUMNS: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    OUTPUTS: gl.constexpr = ROWS // 2 if GATED else ROWS
    OWN: gl.constexpr = TOKENS if TURNS else TOKENS // 2
    dtype: gl.constexpr = x_desc.dtype
    x = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, BLOCK_K], x_desc.layout)
    weights = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], weight_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [4, OWN, COLUMNS], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1 if TURNS else 2)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ring = (x, weights, full, empty)
    token_tiles = (tokens + TOKENS - 1) // TOKENS
    row_tiles = (N + OUTPUTS - 1) // OUTPUTS
    steps = (K + BLOCK_K - 1) // BLOCK_K
    A: gl.constexpr = 0
    B: gl.constexpr = 1
    # (A tuple with a name would make its constants variables.)
    gl.warp_specialize(
        [
            (_multiply_tiles, (A, out_desc, bias_ptr, residual_ptr, parts_ptr, squares_ptr, ring, outs,
                token_tiles, row_tiles, beside, steps, tokens, N, K, parts, eps,
                GATED, PARTS, SQUARES, HAS_BIAS, HAS_RESIDUAL, TURNS, WARPS)),
            (_multiply_tiles, (B, out_desc, bias_ptr, residual_ptr, parts_ptr, squares_ptr, ring, outs,
                token_tiles, row_tiles, beside, steps, tokens, N, K, parts, eps,
                GATED, PARTS, SQUARES, HAS_BIAS, HAS_RESIDUAL, TURNS, WARPS)),
            (_bring_tiles, (x_desc, weight_desc, ring, token_tiles, row_tiles, beside, steps, N, GATED)),
        ],
        [WARPS, 1],
        [240, 24],
    )  # fmt: skip


def large_batch_linear(
    x: Tensor,
    weight: Tensor,
    *,
    tiling: Tiling,
    bias: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    leave_squares: Tensor | None = None,
) -> Tensor:
    """All of the module's formulas: x [tokens, in_features], weight [out_features, in_features], contiguous.

    `squares`, float32 [parts, tokens], in all the sums of x's squares: the scale of x's RMS norm (with `eps`)
    is applied, before the bias; None: no norm. `gated`: the weight's first half are the gate's rows; the
    result is half as wide, and there is neither bias nor residual. `residual` [tokens, out_features] is
    added to in place and returned. `leave_squares`, float32 [`parts_of(tiling, out_features)`, tokens]: is
    given the sums of the result's squares.
    """
    tokens, in_features = x.shape
    out_features = len(weight) // 2 if gated else len(weight)
    out = residual
    if out is None:
        out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    outputs = tiling.rows // 2 if gated else tiling.rows
    tiles = -(-tokens // tiling.tokens) * -(-out_features // outputs)
    _large_batch_kernel[(min(tiles, _PROCESSORS),)](
        descriptor(x, tiling.tokens, _BLOCK_K),
        descriptor(weight, outputs, _BLOCK_K),
        descriptor(out, tiling.tokens if tiling.turns else tiling.tokens // 2, _COLUMNS),
        x if bias is None else bias,
        out,
        out if squares is None else squares,
        out if leave_squares is None else leave_squares,
        tokens,
        out_features,
        in_features,
        0 if squares is None else len(squares),
        tiling.beside,
        eps,
        GATED=gated,
        PARTS=0 if squares is None else -(-len(squares) // 16) * 16,
        SQUARES=leave_squares is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        TOKENS=tiling.tokens,
        ROWS=tiling.rows,
        BLOCK_K=_BLOCK_K,
        STAGES=tiling.stages,
        TURNS=tiling.turns,
        COLUMNS=_COLUMNS,
        WARPS=_WARPS,
        num_warps=_WARPS,
        **pdl_options(x),
    )
    return out
