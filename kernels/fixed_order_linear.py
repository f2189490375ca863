"""Linear layers whose result for a row is the same bits, however many rows are multiplied together.

    y = act(x W^T + b),        r = r + act(x W^T + b)

The order of summation belongs to the matrix: its columns are cut into `runs(weight)` equal runs, each run is
one chain of matrix instructions over 16 neighbouring columns at a time, and the runs' sums are added in their
order. Which tile of outputs a program computes, whether it computes all runs or one, and how many rows there
are changes nothing of that. An H200's matrix instructions of all shapes add alike, those of a warp and those
of a warp group; `worker/invariance.py` checks the GPU at hand.

Three ways, by the number of rows. For up to 16, one program computes all runs of a few features, at once: its
tile is (run, feature) by (run, token), of which the diagonal counts. For more, runs are spread over programs
until there are enough of those; the one that finishes a tile last adds its runs. For many, a program computes
all runs of its tile, one after the other.
"""

# mypy: disable-error-code="assignment"
# (A descriptor and a tensor take turns under one name.)

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dot import dot
from .fused_linear import ACTIVATIONS
from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous
from .vector_linear import Activation

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    TensorDescriptor = None

FEW = 16
"""Rows that the first way takes."""
_LINES = 64
"""(run, feature) pairs of a program with few rows: the matrix instruction's M."""
_PROGRAMS = 128
"""To aim at when a matrix is cut into runs."""
_MOST_RUNS = 8
_NARROWEST = 128
"""Columns of a run."""
_ENOUGH = 264
"""Tiles from which runs are not spread."""


class Tiling(NamedTuple):
    """What one program computes, and how, with more than a few rows."""

    features: int
    """Rows of the weight matrix: the matrix instruction's M."""
    tokens: int
    columns: int
    """At a time."""
    num_warps: int
    num_stages: int
    descriptors: bool = False
    """Tiles are loaded by the tensor memory accelerator."""


class Workspace(NamedTuple):
    """Memory that launches share. One launch at a time uses it."""

    arrivals: Tensor
    """int32, programs that have finished a tile; zero between launches."""

    @classmethod
    def empty(cls, device: torch.device) -> Workspace:
        return cls(torch.zeros(_ENOUGH, dtype=torch.int32, device=device))


@cache
def runs(out_features: int, in_features: int) -> int:
    """Into how many runs the columns of such a matrix are cut."""
    count = 1
    while (
        count < _MOST_RUNS
        and in_features % (128 * count) == 0
        and in_features // (2 * count) >= _NARROWEST
        and count * triton.cdiv(out_features, 64) < _PROGRAMS
    ):
        count *= 2
    return count


def tiling(tokens: int, out_features: int, num_runs: int, dtype: torch.dtype) -> Tiling:
    """What suits so many rows on an H200."""
    if dtype == torch.float32:  # no matrix instructions: it lies in many registers
        return Tiling(64, 16 if tokens <= FEW else 64, 32, 4, 2)
    if tokens <= 32:
        return Tiling(64, 32, 128, 4, 4)
    if tokens <= 64:
        return Tiling(64, 64, 128, 4, 3)
    if tokens <= 128:
        if num_runs > 1:
            return Tiling(64, 128, 64, 4, 5)
        return Tiling(64, 128, 64, 4, 4) if out_features <= 1 << 14 else Tiling(128, 128, 64, 4, 3)
    if num_runs == 1:
        return Tiling(128, 256, 64, 8, 3, descriptors=True)
    return Tiling(128, 128, 64, 8, 4, descriptors=True)


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
    num_runs = runs(out_features, in_features)
    out = residual
    if out is None:
        out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    operands = x, weight, x if bias is None else bias, out
    sizes = tokens, out_features, in_features, in_features // num_runs, x.stride(0)
    options: dict[str, Any] = {
        "ACTIVATION": activation,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        **pdl_options(x),
    }
    if chosen is None and tokens <= FEW and x.dtype != torch.float32:
        _few_rows(operands, sizes, num_runs, options)
    else:
        how = chosen or tiling(tokens, out_features, num_runs, x.dtype)
        _many_rows(operands, sizes, num_runs, options, how, workspace)
    return out


def fixed_order_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = "none"
) -> Tensor:
    """The same in torch, in the precision of its arguments and in no particular order."""
    return ACTIVATIONS[activation](torch.nn.functional.linear(x, weight, bias))


def _few_rows(
    operands: tuple[Tensor, ...], sizes: tuple[int, ...], num_runs: int, options: dict[str, Any]
) -> None:
    out_features, length = sizes[1], sizes[3]
    features = _LINES // num_runs
    _few_rows_kernel[(triton.cdiv(out_features, features),)](
        *operands,
        *sizes,
        EVEN=length % 128 == 0,
        RUNS=num_runs,
        FEATURES=features,
        TOKENS=FEW,
        COLUMNS=128,
        PREFETCH=min(512, triton.next_power_of_2(length)),
        num_warps=4,
        num_stages=4 if num_runs in (1, 8) else 6,
        **options,
    )


def _many_rows(
    operands: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    num_runs: int,
    options: dict[str, Any],
    how: Tiling,
    workspace: Workspace,
) -> None:
    x, weight, bias, out = operands
    tokens, out_features, _, length, _ = sizes
    tiles = triton.cdiv(out_features, how.features) * triton.cdiv(tokens, how.tokens)
    spread = num_runs > 1 and tiles < _ENOUGH
    partial = out
    if spread:
        size = num_runs * tiles * how.features * how.tokens
        partial = torch.empty(size, dtype=torch.float32, device=x.device)
    descriptors = how.descriptors and _can_describe(x) and _can_describe(weight)
    if descriptors:
        x = TensorDescriptor.from_tensor(x, [how.tokens, how.columns])
        weight = TensorDescriptor.from_tensor(weight, [how.features, how.columns])
    _many_rows_kernel[tiles, num_runs if spread else 1](
        x,
        weight,
        bias,
        out,
        partial,
        workspace.arrivals,
        *sizes,
        num_runs,
        EVEN=length % how.columns == 0,
        SPREAD=spread,
        DESCRIPTORS=descriptors,
        FEATURES=how.features,
        TOKENS=how.tokens,
        COLUMNS=how.columns,
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        **options,
    )


def _can_describe(x: Tensor) -> bool:
    """Whether the tensor memory accelerator can load from it."""
    at, stride = x.data_ptr(), x.stride(0) * x.itemsize
    return TensorDescriptor is not None and at % 16 == 0 and stride % 16 == 0 and x.shape[1] >= 64


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
    inside,
    first,
    length,
    EVEN: tl.constexpr,
    LINES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """[LINES, TOKENS]: the sums over `length` columns from `first` on.

    Args:
        weights, x: pointers to rows [LINES, 1] and [1, TOKENS]
        inside: bool [1, TOKENS], the rows of x that there are. Were the others read from the last one, all
            programs would ask the cache for the same lines: 22 us instead of 18 at one row.
    """
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([LINES, TOKENS], tl.float32)
    for start in range(0, length, COLUMNS):
        k = first + start + column
        if EVEN:
            w = tl.load(weights + k[None, :])
            tokens = tl.load(x + k[:, None], mask=inside, other=0.0)
        else:
            exists = start + column < length
            w = tl.load(weights + k[None, :], mask=exists[None, :], other=0.0)
            tokens = tl.load(x + k[:, None], mask=inside & exists[:, None], other=0.0)
        total = dot(w, tokens, total, "ieee")
    return total


@triton.jit
def _described_run(
    weights,
    x,
    feature,
    token,
    first,
    length,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`_run` by descriptors, of the tile that begins at `feature` and `token`. Outside there are zeros."""
    total = tl.zeros([FEATURES, TOKENS], tl.float32)
    for start in range(0, length, COLUMNS):
        w = weights.load([feature, first + start])
        total = dot(w, x.load([token, first + start]).T, total, "ieee")
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
def _few_rows_kernel(
    x_ptr,  # [tokens, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features]
    out_ptr,  # [tokens, out_features], the residual too
    tokens,
    out_features,
    in_features,
    length,  # of a run
    x_stride,
    EVEN: tl.constexpr,  # runs are multiples of COLUMNS
    RUNS: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PREFETCH: tl.constexpr,  # columns of weights to send for before the kernel in front has ended
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    first = tl.program_id(0) * FEATURES
    line = tl.arange(0, RUNS * FEATURES)
    feature = tl.minimum(first + line % FEATURES, out_features - 1)
    weights = weight_ptr + feature.to(tl.int64)[:, None] * in_features + (line // FEATURES * length)[:, None]
    if PDL:
        ahead = tl.arange(0, PREFETCH // 64) * 64
        _prefetch(weights + tl.minimum(ahead, length - 1)[None, :])
    wait_previous(PDL)
    across = tl.arange(0, RUNS * TOKENS)
    token = across % TOKENS
    x = x_ptr + token.to(tl.int64)[None, :] * x_stride + (across // TOKENS * length)[None, :]
    inside = (token < tokens)[None, :]
    total = _run(weights, x, inside, 0, length, EVEN, RUNS * FEATURES, RUNS * TOKENS, COLUMNS)
    if RUNS > 1:
        # A run's weights with its own columns; the sums over zeros are exact.
        each = tl.reshape(total, [RUNS, FEATURES, RUNS, TOKENS])
        run = tl.arange(0, RUNS)
        own = run[:, None, None, None] == run[None, None, :, None]
        diagonal = tl.sum(tl.where(own, each, 0.0), 2)
        total = tl.sum(tl.where((run == 0)[:, None, None], diagonal, 0.0), 0)
        for number in tl.static_range(1, RUNS):
            total += tl.sum(tl.where((run == number)[:, None, None], diagonal, 0.0), 0)
    _finish(
        total,
        first + tl.arange(0, FEATURES),
        tl.arange(0, TOKENS),
        bias_ptr,
        out_ptr,
        tokens,
        out_features,
        ACTIVATION,
        HAS_BIAS,
        HAS_RESIDUAL,
    )


@triton.jit(do_not_specialize=["tokens"])
def _many_rows_kernel(
    x_ptr,  # [tokens, in_features], or its descriptor
    weight_ptr,  # [out_features, in_features], or its descriptor
    bias_ptr,  # [out_features]
    out_ptr,  # [tokens, out_features], the residual too
    partial_ptr,  # float32 [runs, tiles, FEATURES, TOKENS]
    arrivals_ptr,  # int32 [tiles]
    tokens,
    out_features,
    in_features,
    length,  # of a run
    x_stride,
    runs,
    EVEN: tl.constexpr,  # runs are multiples of COLUMNS
    SPREAD: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FEATURES: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    GROUP: tl.constexpr = 8
    allow_next(PDL)
    # Programs that run at the same time share what they read: GROUP tiles of features by all tokens.
    tile = tl.program_id(0)
    across = tl.cdiv(tokens, TOKENS)
    block = tile // (GROUP * across)
    rows = tl.minimum(tl.cdiv(out_features, FEATURES) - block * GROUP, GROUP)
    inner = tile % (GROUP * across)
    first_feature = (block * GROUP + inner % rows) * FEATURES
    first_token = inner // rows * TOKENS
    feature = first_feature + tl.arange(0, FEATURES)
    token = first_token + tl.arange(0, TOKENS)
    inside = (token < tokens)[None, :]
    if not DESCRIPTORS:
        weights = weight_ptr + tl.minimum(feature, out_features - 1).to(tl.int64)[:, None] * in_features
        x = x_ptr + token.to(tl.int64)[None, :] * x_stride
    wait_previous(PDL)
    begin = 0
    end = runs
    if SPREAD:
        begin = tl.program_id(1)
        end = begin + 1
    if DESCRIPTORS:
        total = _described_run(
            weight_ptr, x_ptr, first_feature, first_token, begin * length, length, FEATURES, TOKENS, COLUMNS
        )
        if not SPREAD:
            for run in range(1, end):
                total += _described_run(
                    weight_ptr, x_ptr, first_feature, first_token, run * length, length, FEATURES, TOKENS,
                    COLUMNS,
                )  # fmt: skip
    else:
        total = _run(weights, x, inside, begin * length, length, EVEN, FEATURES, TOKENS, COLUMNS)
        if not SPREAD:
            for run in range(1, end):
                total += _run(weights, x, inside, run * length, length, EVEN, FEATURES, TOKENS, COLUMNS)
    if SPREAD:
        size = tl.num_programs(0) * FEATURES * TOKENS
        inner_place = tl.arange(0, FEATURES)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
        place = partial_ptr + tile * (FEATURES * TOKENS) + inner_place
        tl.store(place + begin * size, total)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel", scope="gpu") < runs - 1:
            return
        tl.store(arrivals_ptr + tile, 0)
        total = tl.load(place, cache_modifier=".cg")
        for run in range(1, runs):
            total += tl.load(place + run * size, cache_modifier=".cg")
    _finish(
        total, feature, token, bias_ptr, out_ptr, tokens, out_features, ACTIVATION, HAS_BIAS, HAS_RESIDUAL
    )
