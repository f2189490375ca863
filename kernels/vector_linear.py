"""The linear layers of `fused_linear` for one token, a matrix-vector product each.

A program loads all its weight rows into registers before it waits for the kernel in front of it (see `pdl`),
so the weights of the next operation are under way while the last one finishes; then it loads x. Every cycle
between the wait and the store is one that a step waits for, so nothing else is loaded there but the residual,
and each thread loads the part of x that its weights need: passing it on from thread to thread took longer
than all of the products. The scale of an RMS norm is applied to the sums. More tokens work, at one pass over
the weights in registers each.
"""

# mypy: disable-error-code="assignment"
# (Triton's tuples grow under one name.)

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous

Activation: TypeAlias = Literal["none", "relu", "gelu"]
"""GELU is the exact one, by the error function."""


class Tiling(NamedTuple):
    """How a program's share of the weights lies in its registers."""

    rows: int
    """Weight rows (of each half for a gated layer) that a group of warps has."""
    groups: int
    """A program's groups of warps."""
    block_k: int
    """Columns per load; a power of two."""
    num_warps: int


@cache
def tiling(out_features: int, in_features: int, gated: bool) -> Tiling:
    """The best, or nearly, of a sweep over the models of scripts/models on an H200.

    Below 2048 columns each warp has rows of its own: their sums need no other warp. Programs are few and
    large, but where rows are few. More columns are shared by all warps of a program, as few as 96 weights a
    thread (48 registers) allow, gated 128; where 16 warps are not enough, 2 rows and up to 128 weights: 28 us
    against 38 for Llama-3.1-8B's down projection.
    """
    halves = 2 if gated else 1
    block_k = _block_k(in_features)
    if in_features < 2048:
        if not gated and out_features < 2048:
            return Tiling(1, 2, min(block_k, 256), 2)
        return Tiling(1 if gated and in_features > 1024 else 2, 8, min(block_k, 256), 8)
    if 2048 < in_features <= 4096 and out_features < 2048 and not gated:
        return Tiling(1, 4, 512, 8)
    rows = 4
    while rows > 1 and triton.cdiv(out_features, rows) < 132:
        rows //= 2
    most = 128 if gated else 96
    if rows * halves * in_features > most * 32 * 16:
        rows, most = max(rows // 2, 1), 128
    num_warps = 4
    while num_warps < 16 and rows * halves * in_features > most * 32 * num_warps:
        num_warps *= 2
    if block_k < 256 * num_warps and not gated and rows * in_features > 96 * 64:
        # Some of the warps would share a row's piece: 11.0 us against 8.6 for Qwen2.5-1.5B's 8960 columns.
        return Tiling(rows, 1, 2048, 8)
    return Tiling(rows, 1, block_k, num_warps)


def _block_k(in_features: int) -> int:
    """The largest power of two up to 4096 whose multiple is `in_features` or exceeds it by under 3 %."""
    candidates = [1 << shift for shift in range(12, 3, -1)]
    waste = [-in_features % size / in_features for size in candidates]
    return next((size for size, w in zip(candidates, waste, strict=True) if w < 0.03), candidates[-1])


@triton.jit
def _load_rows(weight_ptr, row, inside, K: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_ROWS: tl.constexpr):
    """Rows `row` [GROUPS, ROWS] of a matrix, zeros if not `inside`, as a tuple of [GROUPS, ROWS, BLOCK_K]."""
    pieces = ()
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, None, :]
        pointers = weight_ptr + row.to(tl.int64)[:, :, None] * K + k
        if WHOLE_ROWS and start + BLOCK_K <= K:
            piece = tl.load(pointers, eviction_policy="evict_first")
        else:
            exists = inside[:, :, None] & (k < K)
            piece = tl.load(pointers, mask=exists, other=0.0, eviction_policy="evict_first")
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def _load_vector(vector_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUPS: tl.constexpr):
    """A vector of K elements, for each group, as a tuple of [GROUPS, BLOCK_K], zero beyond K.

    In this shape it lies in the threads as the weights do.
    """
    pieces = ()
    for start in tl.static_range(0, K, BLOCK_K):
        k = tl.broadcast_to(start + tl.arange(0, BLOCK_K)[None, :], GROUPS, BLOCK_K)
        if start + BLOCK_K <= K:
            piece = tl.load(vector_ptr + k)
        else:
            piece = tl.load(vector_ptr + k, mask=k < K, other=0.0)
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def _sum_of_squares(pieces, PIECES: tl.constexpr):
    total = pieces[0] * pieces[0]
    for i in tl.static_range(1, PIECES):
        total += pieces[i] * pieces[i]
    return tl.sum(total, 1)


@triton.jit
def _matvec(rows, x, PIECES: tl.constexpr):
    """Products of the weight rows with x, [GROUPS, ROWS]. Eight neighbours in one thread are added first."""
    GROUPS: tl.constexpr = rows[0].shape[0]
    ROWS: tl.constexpr = rows[0].shape[1]
    EIGHTS: tl.constexpr = rows[0].shape[2] // 8
    total = tl.sum(tl.reshape(rows[0].to(tl.float32) * x[0][:, None, :], [GROUPS, ROWS, EIGHTS, 8]), 3)
    for i in tl.static_range(1, PIECES):
        total += tl.sum(tl.reshape(rows[i].to(tl.float32) * x[i][:, None, :], [GROUPS, ROWS, EIGHTS, 8]), 3)
    return tl.sum(total, 2)


@triton.jit
def _floats(pieces, PIECES: tl.constexpr):
    floats = ()
    for i in tl.static_range(PIECES):
        floats = floats + (pieces[i].to(tl.float32),)
    return floats


@triton.jit
def _normed(
    loaded,
    norm_weight,
    norm_bias,
    eps,
    NORM: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One token's x in float32, and the factor that its products still need."""
    x = _floats(loaded, PIECES)
    scale = 1.0
    if NORM == "rms" or NORM == "folded":
        scale = tl.rsqrt(_sum_of_squares(x, PIECES) / K + eps)[:, None]
    if NORM == "rms":
        scaled = ()
        for i in tl.static_range(PIECES):
            scaled = scaled + (x[i] * norm_weight[i].to(tl.float32),)
        x = scaled
    elif NORM == "layer":
        total = x[0]
        for i in tl.static_range(1, PIECES):
            total += x[i]
        mean = (tl.sum(total, 1) / K)[:, None]
        centred = ()
        for i in tl.static_range(PIECES):
            inside = (i * BLOCK_K + tl.arange(0, BLOCK_K) < K)[None, :]
            centred = centred + (tl.where(inside, x[i] - mean, 0.0),)
        deviation = tl.rsqrt(_sum_of_squares(centred, PIECES) / K + eps)[:, None]
        scaled = ()
        for i in tl.static_range(PIECES):
            piece = centred[i] * deviation * norm_weight[i].to(tl.float32)
            scaled = scaled + (piece + norm_bias[i].to(tl.float32),)
        x = scaled
    return x, scale


@triton.jit
def _fused_linear_kernel(
    x_ptr,  # [TOKENS, K]
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    weight_ptr,  # [N, K]; gated: [2 * N, K]
    bias_ptr,  # [N]
    residual_ptr,  # [TOKENS, N]; may be out_ptr
    out_ptr,  # [TOKENS, N]
    eps,
    TOKENS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    PIECES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WHOLE_ROWS: tl.constexpr = N % (ROWS * GROUPS) == 0
    first = tl.program_id(0) * (ROWS * GROUPS) + tl.arange(0, GROUPS)[:, None] * ROWS
    row = first + tl.arange(0, ROWS)[None, :]
    inside = row < N
    allow_next(PDL)
    if GATED:
        # Each of the gate's rows is followed by its row of up.
        number = tl.arange(0, 2 * ROWS)[None, :]
        pair = first + number // 2
        rows = _load_rows(weight_ptr, pair + number % 2 * N, pair < N, K, BLOCK_K, WHOLE_ROWS)
    else:
        rows = _load_rows(weight_ptr, row, inside, K, BLOCK_K, WHOLE_ROWS)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    norm_weight = ()
    norm_bias = ()
    if NORM == "rms" or NORM == "layer":
        norm_weight = _load_vector(norm_weight_ptr, K, BLOCK_K, GROUPS)
    if NORM == "layer":
        norm_bias = _load_vector(norm_bias_ptr, K, BLOCK_K, GROUPS)
    wait_previous(PDL)
    for token in tl.static_range(TOKENS):
        loaded = _load_vector(x_ptr + token * K, K, BLOCK_K, GROUPS)
        residual = 0.0
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + token * N + row, mask=inside, other=0.0).to(tl.float32)
        x, scale = _normed(loaded, norm_weight, norm_bias, eps, NORM, K, BLOCK_K, PIECES)
        y = _matvec(rows, x, PIECES) * scale
        if GATED:
            gate, up = tl.split(tl.reshape(y, [GROUPS, ROWS, 2]))
            y = gate / (1.0 + tl.exp(-gate)) * up
        y += bias
        if ACTIVATION == "relu":
            y = tl.maximum(y, 0.0)
        elif ACTIVATION == "gelu":
            y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
        y += residual
        tl.store(out_ptr + token * N + row, y.to(out_ptr.dtype.element_ty), mask=inside)


def vector_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_is_folded: bool = False,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
    activation: Activation = "none",
    residual: Tensor | None = None,
    tiles: Tiling | None = None,
) -> Tensor:
    """All of `fused_linear`'s formulas: x [tokens, in_features], weight [out_features, in_features], dense.

    `norm_weight`: RMS norm; with `norm_bias`, layer norm. `norm_is_folded`: RMS norm whose weight is in
    `weight` already, which spares the registers of a vector like x. `gated`: the weight's first half are
    the gate's rows; the result is half as wide. `residual` [tokens, out_features] is added to in place and
    returned; the sum is rounded once.
    """
    tokens, in_features = x.shape
    out_features = len(weight) // 2 if gated else len(weight)
    out = residual
    if out is None:
        out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = tiles or tiling(out_features, in_features, gated)
    norm = "none" if norm_weight is None else "rms" if norm_bias is None else "layer"
    if norm_is_folded:
        norm = "folded"
    _fused_linear_kernel[(triton.cdiv(out_features, chosen.rows * chosen.groups),)](
        x,
        x if norm_weight is None else norm_weight,
        x if norm_bias is None else norm_bias,
        weight,
        x if bias is None else bias,
        out,
        out,
        eps,
        TOKENS=tokens,
        N=out_features,
        K=in_features,
        NORM=norm,
        GATED=gated,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=chosen.rows,
        GROUPS=chosen.groups,
        BLOCK_K=chosen.block_k,
        num_warps=chosen.num_warps,
        **pdl_options(x),
    )
    return out
