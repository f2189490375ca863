"""Linear layers whose result for a row is the same bits, however many rows are multiplied together.

    y = act(x W^T + b),        r = r + act(x W^T + b)

The order of summation belongs to the matrix: its columns are cut into `pieces(weight)` equal runs, each run
is one chain of matrix instructions over 16 neighbouring columns at a time, and the runs' sums are added in
their order. Which tile of outputs a program computes, whether it computes all runs or one, and how many rows
there are changes nothing of that. `worker/invariance.py` checks on the GPU at hand that its matrix
instructions of different shapes add alike.

With few rows the runs are spread over programs, so that all of the GPU reads weights; the program that
finishes a tile last adds its runs. With many rows one program computes all runs of its tile.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .fused_linear import ACTIVATIONS, Activation
from .jit import INTERPRETED, tl, triton
from .pdl import allow_next, pdl_options, wait_previous

_PROGRAMS = 128
"""To aim at when a matrix is cut into runs."""
_MOST_PIECES = 8
_NARROWEST = 128
"""Columns of a run."""


class Tiling(NamedTuple):
    """What one program computes, and how."""

    features: int
    """Rows of the weight matrix: the matrix instruction's M, so 64 or more of them use a warp group's."""
    tokens: int
    columns: int
    """At a time."""
    spread: bool
    """A program computes one run and not all."""
    num_warps: int
    num_stages: int
    prefetch: int = 0
    """Columns of weights that are sent for before the kernel in front has ended."""


class Workspace(NamedTuple):
    """Memory that launches share. One launch at a time uses it."""

    arrivals: Tensor
    """int32, programs that have finished a tile; zero between launches."""

    @classmethod
    def empty(cls, device: torch.device) -> Workspace:
        return cls(torch.zeros(1 << 14, dtype=torch.int32, device=device))


@cache
def pieces(out_features: int, in_features: int) -> int:
    """Into how many runs the columns of such a matrix are cut."""
    count = 1
    while (
        count < _MOST_PIECES
        and in_features % (128 * count) == 0
        and in_features // (2 * count) >= _NARROWEST
        and count * triton.cdiv(out_features, 64) < _PROGRAMS
    ):
        count *= 2
    return count


def tiling(tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> Tiling:
    """What suits so many rows."""
    if dtype == torch.float32:  # no matrix instructions: it lies in many registers
        return Tiling(64, 16 if tokens <= 16 else 64, 32, tokens <= 256, 4, 2)
    if tokens <= 16:
        return Tiling(64, 16, 128, True, 4, 4)
    if tokens <= 32:
        return Tiling(64, 32, 128, True, 4, 4)
    if tokens <= 64:
        return Tiling(64, 64, 64, True, 4, 5)
    if tokens <= 256:
        return Tiling(64, 128, 64, True, 4, 4)
    return Tiling(128, 256 if pieces(out_features, in_features) == 1 else 128, 64, False, 8, 3)


def fixed_order_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    workspace: Workspace,
    activation: Activation = "none",
    residual: Tensor | None = None,
    chosen: Tiling | None = None,
) -> Tensor:
    """`act(x @ weight.T + bias)`, added to `residual` in place if there is one.

    Args:
        x: [tokens, in_features], dense in the last dimension
        weight: [out_features, in_features], contiguous; `bias`: [out_features]
        residual: [tokens, out_features], contiguous
    """
    tokens, in_features = x.shape
    out_features = len(weight)
    how = chosen or tiling(tokens, out_features, in_features, x.dtype)
    runs = pieces(out_features, in_features)
    out = residual
    if out is None:
        out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(out_features, how.features) * triton.cdiv(tokens, how.tokens)
    spread = how.spread and runs > 1
    partial = out
    if spread:
        assert tiles <= len(workspace.arrivals), f"{tiles} tiles"
        size = runs * tiles * how.features * how.tokens
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    _fixed_order_kernel[tiles, runs if spread else 1](
        x,
        weight,
        x if bias is None else bias,
        out,
        partial,
        workspace.arrivals,
        tokens,
        out_features,
        in_features,
        runs,
        in_features // runs,
        x.stride(0),
        EVEN=in_features // runs % how.columns == 0,
        SPREAD=spread,
        FEATURES=how.features,
        TOKENS=how.tokens,
        COLUMNS=how.columns,
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        PREFETCH=how.prefetch,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        **pdl_options(x),
    )
    return out


def fixed_order_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = "none"
) -> Tensor:
    """The same in torch, in the precision of its arguments and in no particular order."""
    return ACTIVATIONS[activation](torch.nn.functional.linear(x, weight, bias))


@triton.jit
def _dot(a, b, total):
    """The interpreter multiplies bfloat16 wrongly. float32 is not rounded to fewer bits."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _prefetch(pointers):
    """Bring the lines at `pointers` to the second-level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.uint64, bitcast=True)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _run(
    weights,
    x,
    first,
    length,
    EVEN: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums over one run of columns, from pointers to its rows' [., 1] and [1, .] beginnings."""
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([FEATURES, TOKENS], tl.float32)
    for start in range(0, length, COLUMNS):
        k = first + start + column
        if EVEN:
            w = tl.load(weights + k[None, :])
            tokens = tl.load(x + k[:, None])
        else:
            inside = start + column < length
            w = tl.load(weights + k[None, :], mask=inside[None, :], other=0.0)
            tokens = tl.load(x + k[:, None], mask=inside[:, None], other=0.0)
        total = _dot(w, tokens, total)
    return total


@triton.jit
def _finish(
    total,
    feature,
    token,
    bias_ptr,
    out_ptr,
    tokens,
    out_features,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Bias, activation, residual; then the store of [features, tokens]."""
    inside = (feature < out_features)[:, None] & (token < tokens)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + feature, mask=feature < out_features, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION == "relu":
        total = tl.maximum(total, 0.0)
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    place = out_ptr + token.to(tl.int64)[None, :] * out_features + feature[:, None]
    if HAS_RESIDUAL:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _fixed_order_kernel(
    x_ptr,  # [tokens, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features]
    out_ptr,  # [tokens, out_features], the residual too
    partial_ptr,  # float32 [runs, tiles, FEATURES, TOKENS]
    arrivals_ptr,  # int32 [tiles]
    tokens,
    out_features,
    in_features,
    runs,
    length,  # of a run
    x_stride,
    EVEN: tl.constexpr,  # runs are multiples of COLUMNS
    SPREAD: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    tile = tl.program_id(0)
    # Neighbours in time share weights: few rows of tiles at once, all of whose tokens stay in the cache.
    across = tl.cdiv(tokens, TOKENS)
    feature = tile // across * FEATURES + tl.arange(0, FEATURES)
    token = tile % across * TOKENS + tl.arange(0, TOKENS)
    # Outside they read what is inside: cheaper than a mask on every load.
    weights = weight_ptr + tl.minimum(feature, out_features - 1).to(tl.int64)[:, None] * in_features
    x = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[None, :] * x_stride
    if PREFETCH and PDL:
        line = tl.program_id(1) * length + tl.arange(0, PREFETCH // 64) * 64
        _prefetch(weights + line[None, :])
    wait_previous(PDL)
    if SPREAD:
        run = tl.program_id(1)
        total = _run(weights, x, run * length, length, EVEN, FEATURES, TOKENS, COLUMNS)
        size = tl.num_programs(0) * FEATURES * TOKENS
        inner = tl.arange(0, FEATURES)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        place = partial_ptr + tile * (FEATURES * TOKENS) + inner
        tl.store(place + run * size, total)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") < runs - 1:
            return
        tl.store(arrivals_ptr + tile, 0)
        total = tl.load(place, cache_modifier=".cg")
        for other in range(1, runs):
            total += tl.load(place + other * size, cache_modifier=".cg")
    else:
        total = _run(weights, x, 0, length, EVEN, FEATURES, TOKENS, COLUMNS)
        for run in range(1, runs):
            total += _run(weights, x, run * length, length, EVEN, FEATURES, TOKENS, COLUMNS)
    _finish(
        total, feature, token, bias_ptr, out_ptr, tokens, out_features, ACTIVATION, HAS_BIAS, HAS_RESIDUAL
    )
