"""The linear layers of `fused_linear` for one token, a matrix-vector product each.

A program loads all its weight rows into registers before it waits for the kernel in front of it (see `pdl`),
so the weights of the next operation are under way while the last one finishes; then it loads x. The scale of
an RMS norm is applied to the sums. More tokens work, at one pass over the weights in registers each.
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
    """Weight rows per program (of each half for a gated layer)."""
    block_k: int
    """Columns per load; a power of two."""
    num_warps: int
    programs: int | None = None
    """None: one program per tile. Else so many programs walk over the tiles, loading one tile ahead."""


@cache
def tiling(out_features: int, in_features: int, gated: bool) -> Tiling:
    """Four rows (of each half) and as few warps as 96 weights a thread (48 registers) allow, gated 128.

    Where 16 warps are not enough, 2 rows and up to 128 weights: 28 us against 38 for Llama-3.1-8B's down
    projection. On an H200 mostly within 5 % of the best of a sweep over the matrices of scripts/models.
    """
    halves = 2 if gated else 1
    rows = 4
    while rows > 1 and triton.cdiv(out_features, rows) < 132:
        rows //= 2
    most = 128 if gated else 96
    if rows * halves * in_features > most * 32 * 16:
        rows, most = max(rows // 2, 1), 128
    num_warps = 4
    while num_warps < 16 and rows * halves * in_features > most * 32 * num_warps:
        num_warps *= 2
    block_k = _block_k(in_features)
    if block_k < 256 * num_warps and not gated:
        # Some of the warps would share a row's piece. Rather all, or one: 2.3 us against 3.3 for the queries,
        # keys and values of Qwen2.5-1.5B (1536 columns), 8.6 against 11.0 for its down projection (8960).
        return Tiling(rows, 2048, 8) if rows * in_features > 96 * 64 else Tiling(rows, 256, 2)
    return Tiling(rows, block_k, num_warps)


def _block_k(in_features: int) -> int:
    """The largest power of two up to 4096 whose multiple is `in_features` or exceeds it by under 3 %."""
    candidates = [1 << shift for shift in range(12, 3, -1)]
    waste = [-in_features % size / in_features for size in candidates]
    return next((size for size, w in zip(candidates, waste, strict=True) if w < 0.03), candidates[-1])


@triton.jit
def _load_rows(
    weight_ptr,
    first,
    limit,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """ROWS rows of a [limit, K] matrix from `first` on, zeros outside, as a tuple of [ROWS, BLOCK_K]."""
    row = first + tl.arange(0, ROWS)
    pieces = ()
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        pointers = weight_ptr + row.to(tl.int64)[:, None] * K + k[None, :]
        if WHOLE_ROWS and start + BLOCK_K <= K:
            piece = tl.load(pointers, eviction_policy=EVICTION)
        else:
            piece = tl.load(
                pointers,
                mask=(row < limit)[:, None] & (k < K)[None, :],
                other=0.0,
                eviction_policy=EVICTION,
            )
        pieces = pieces + (piece,)
    return pieces


@triton.jit
def _load_vector(vector_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A vector of K elements as a tuple of float32 [BLOCK_K] pieces, zero beyond K."""
    pieces = ()
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if start + BLOCK_K <= K:
            piece = tl.load(vector_ptr + k)
        else:
            piece = tl.load(vector_ptr + k, mask=k < K, other=0.0)
        pieces = pieces + (piece.to(tl.float32),)
    return pieces


@triton.jit
def _sum_of_squares(pieces, PIECES: tl.constexpr):
    total = pieces[0] * pieces[0]
    for i in tl.static_range(1, PIECES):
        total += pieces[i] * pieces[i]
    return tl.sum(total, 0)


@triton.jit
def _matvec(rows, x, PIECES: tl.constexpr):
    """Products of the weight rows with x. Eight neighbours lie in one thread: they are added first."""
    BLOCK_K: tl.constexpr = rows[0].shape[1]
    ROWS: tl.constexpr = rows[0].shape[0]
    total = tl.sum(tl.reshape(rows[0].to(tl.float32) * x[0][None, :], [ROWS, BLOCK_K // 8, 8]), 2)
    for i in tl.static_range(1, PIECES):
        total += tl.sum(tl.reshape(rows[i].to(tl.float32) * x[i][None, :], [ROWS, BLOCK_K // 8, 8]), 2)
    return tl.sum(total, 1)


@triton.jit
def _normed(
    x_ptr,
    norm_weight,
    norm_bias,
    eps,
    NORM: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One token's x, and the factor that its products still need."""
    x = _load_vector(x_ptr, K, BLOCK_K)
    scale = 1.0
    if NORM == "rms":
        scale = tl.rsqrt(_sum_of_squares(x, PIECES) / K + eps)
        scaled = ()
        for i in tl.static_range(PIECES):
            scaled = scaled + (x[i] * norm_weight[i],)
        x = scaled
    elif NORM == "layer":
        total = x[0]
        for i in tl.static_range(1, PIECES):
            total += x[i]
        mean = tl.sum(total, 0) / K
        centred = ()
        for i in tl.static_range(PIECES):
            inside = i * BLOCK_K + tl.arange(0, BLOCK_K) < K
            centred = centred + (tl.where(inside, x[i] - mean, 0.0),)
        deviation = tl.rsqrt(_sum_of_squares(centred, PIECES) / K + eps)
        scaled = ()
        for i in tl.static_range(PIECES):
            scaled = scaled + (centred[i] * deviation * norm_weight[i] + norm_bias[i],)
        x = scaled
    return x, scale


@triton.jit
def _finish(
    sums,
    up_sums,
    row,
    bias_ptr,
    residual_ptr,
    out_ptr,
    N: tl.constexpr,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation, gate, residual; then the store of one token's outputs `row`."""
    inside = row < N
    if HAS_BIAS:
        sums += tl.load(bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "relu":
        sums = tl.maximum(sums, 0.0)
    elif ACTIVATION == "gelu":
        sums = 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))
    if GATED:
        sums = sums / (1.0 + tl.exp(-sums)) * up_sums
    if HAS_RESIDUAL:
        sums += tl.load(residual_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, sums.to(out_ptr.dtype.element_ty), mask=inside)


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
    BLOCK_K: tl.constexpr,
    WALK: tl.constexpr,
    EVICTION: tl.constexpr,
    PDL: tl.constexpr,
):
    PIECES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = (N + ROWS - 1) // ROWS
    WHOLE_ROWS: tl.constexpr = N % ROWS == 0
    tile = tl.program_id(0)
    allow_next(PDL)
    rows = _load_rows(weight_ptr, tile * ROWS, N, ROWS, K, BLOCK_K, WHOLE_ROWS, EVICTION)
    ups = rows
    if GATED:
        ups = _load_rows(weight_ptr, N + tile * ROWS, 2 * N, ROWS, K, BLOCK_K, WHOLE_ROWS, EVICTION)
    norm_weight = ()
    norm_bias = ()
    if NORM != "none":
        norm_weight = _load_vector(norm_weight_ptr, K, BLOCK_K)
    if NORM == "layer":
        norm_bias = _load_vector(norm_bias_ptr, K, BLOCK_K)
    wait_previous(PDL)
    if WALK:
        # One token: x stays in registers while the program walks over its tiles.
        x, scale = _normed(x_ptr, norm_weight, norm_bias, eps, NORM, K, BLOCK_K, PIECES)
        for current in range(tile, TILES, tl.num_programs(0)):
            # Past the end the last tile is loaded again: cheaper than a mask on every load.
            following = tl.minimum(current + tl.num_programs(0), TILES - 1)
            next_rows = _load_rows(weight_ptr, following * ROWS, N, ROWS, K, BLOCK_K, WHOLE_ROWS, EVICTION)
            next_ups = next_rows
            up_sums = 0.0
            if GATED:
                next_ups = _load_rows(
                    weight_ptr, N + following * ROWS, 2 * N, ROWS, K, BLOCK_K, WHOLE_ROWS, EVICTION
                )
                up_sums = _matvec(ups, x, PIECES) * scale
            _finish(
                _matvec(rows, x, PIECES) * scale,
                up_sums,
                current * ROWS + tl.arange(0, ROWS),
                bias_ptr,
                residual_ptr,
                out_ptr,
                N,
                GATED,
                ACTIVATION,
                HAS_BIAS,
                HAS_RESIDUAL,
            )
            rows = next_rows
            ups = next_ups
    else:
        for token in tl.static_range(TOKENS):
            x, scale = _normed(x_ptr + token * K, norm_weight, norm_bias, eps, NORM, K, BLOCK_K, PIECES)
            up_sums = 0.0
            if GATED:
                up_sums = _matvec(ups, x, PIECES) * scale
            _finish(
                _matvec(rows, x, PIECES) * scale,
                up_sums,
                tile * ROWS + tl.arange(0, ROWS),
                bias_ptr,
                residual_ptr + token * N,
                out_ptr + token * N,
                N,
                GATED,
                ACTIVATION,
                HAS_BIAS,
                HAS_RESIDUAL,
            )


def vector_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
    activation: Activation = "none",
    residual: Tensor | None = None,
    tiles: Tiling | None = None,
) -> Tensor:
    """All of `fused_linear`'s formulas: x [tokens, in_features], weight [out_features, in_features], dense.

    `norm_weight`: RMS norm; with `norm_bias`, layer norm. `gated`: the weight's first half are the gate's
    rows; the result is half as wide. `residual` [tokens, out_features] is added to in place and returned; the
    sum is rounded once.
    """
    tokens, in_features = x.shape
    out_features = len(weight) // 2 if gated else len(weight)
    out = residual
    if out is None:
        out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    chosen = tiles or tiling(out_features, in_features, gated)
    num_tiles = triton.cdiv(out_features, chosen.rows)
    walk = chosen.programs is not None and tokens == 1
    norm = "none" if norm_weight is None else "rms" if norm_bias is None else "layer"
    _fused_linear_kernel[(min(chosen.programs or num_tiles, num_tiles) if walk else num_tiles,)](
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
        BLOCK_K=chosen.block_k,
        WALK=walk,
        EVICTION="evict_first",
        num_warps=chosen.num_warps,
        **pdl_options(x),
    )
    return out
