"""The linear layers of `fused_linear` for batches of a few tokens, by matrix instructions.

    y = act(norm(x) W^T + b),  silu(norm(x) G^T) * (norm(x) U^T),  r + x W^T + b        for up to 16 tokens

A matrix instruction multiplies 16 weight rows with 8 tokens, so up to 8 tokens cost the same as one. It wants
its operands spread over a warp's threads in small pieces; but as a sum over K may run in any order, a thread
takes 8 neighbouring weights for 4 instructions at once, and the weights go from memory to the registers of
the instruction in 16 byte loads, past shared memory. Hence Gluon, Triton's dialect with explicit layouts.

A program owns 16 or more rows of W; its warps share the columns and add their sums at the end. As in
`fused_linear`, weights are loaded before the wait for the kernel in front.
"""

# mypy: disable-error-code="assignment"
# (Triton's tuples grow under one name.)

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .pdl import pdl_options

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an experimental part of Triton may move; then cuBLAS serves these batches
    AVAILABLE = False
    gluon = SimpleNamespace(jit=lambda function: function)
    gl = mma_v2 = gdc_wait = gdc_launch_dependents = None
else:
    AVAILABLE = True

MAX_TOKENS = 16


class Split(NamedTuple):
    """How a program's warps share the columns."""

    num_warps: int
    columns: int
    """Of each warp in one piece; a power of two, at least 32."""
    ahead: int
    """Pieces loaded before the wait, and kept under way after it."""
    rows: int = 16
    """Weight rows of a program, a multiple of a matrix instruction's 16. Every program reads all tokens."""


@cache
def split(in_features: int, gated: bool = False) -> Split | None:
    """Four warps with 128 weights a thread under way; None where the columns cannot be shared out evenly.

    On an H200 at 8 tokens: more warps only pay for long rows, fewer only where there are very many rows.
    """
    num_warps = 2 if gated and in_features >= 2048 else 4 if in_features <= 4096 else 8
    while num_warps > 1 and in_features % (32 * num_warps):
        num_warps //= 2
    if in_features % 32:
        return None
    each = in_features // num_warps
    columns = min(each & -each, 64)
    ahead = (64 if num_warps == 2 else 128) * 2 // columns
    return Split(num_warps, columns, min(ahead, each // columns))


@gluon.jit
def _load_piece(
    weight_ptr,
    row,
    inside,
    start,
    K: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    EXACT: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """[WARPS, ROWS, COLUMNS] weights from column `start` on."""
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    k = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    column = start + warp[:, None, None] * COLUMNS + k[None, None, :]
    pointers = weight_ptr + row.to(gl.int64)[None, :, None] * K + column
    if EXACT:
        return gl.load(pointers, eviction_policy="evict_first")
    else:
        return gl.load(pointers, mask=inside[None, :, None], other=0.0, eviction_policy="evict_first")


@gluon.jit
def _load_vector(vector_ptr, start, WARPS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """[WARPS, COLUMNS, 1] of a vector over the columns."""
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    k = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    return gl.load(vector_ptr + start + warp[:, None, None] * COLUMNS + k[None, :, None])


@gluon.jit
def _load_tokens(
    x_ptr,
    tokens,
    start,
    K: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    TOKENS: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """[WARPS, COLUMNS, TOKENS] of x, zero from token `tokens` on."""
    warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    k = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    column = start + warp[:, None, None] * COLUMNS + k[None, :, None]
    return gl.load(x_ptr + token * K + column, mask=token < tokens, other=0.0)


@gluon.jit
def _small_batch_kernel(
    x_ptr,  # [tokens, K]
    norm_weight_ptr,  # [K]
    weight_ptr,  # [N, K]; gated: [2 * N, K]
    bias_ptr,  # [N]
    residual_ptr,  # [tokens, N]; may be out_ptr
    out_ptr,  # [tokens, N]
    tokens,
    eps,
    TOKENS: gl.constexpr,
    N: gl.constexpr,
    K: gl.constexpr,
    NORM: gl.constexpr,
    GATED: gl.constexpr,
    RELU: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ROWS: gl.constexpr,
    WARPS: gl.constexpr,
    COLUMNS: gl.constexpr,
    AHEAD: gl.constexpr,
    PDL: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    STEP: gl.constexpr = WARPS * COLUMNS
    PIECES: gl.constexpr = K // STEP
    OUTPUTS: gl.constexpr = ROWS // 2 if GATED else ROWS
    EXACT: gl.constexpr = N % OUTPUTS == 0
    first = gl.program_id(0) * OUTPUTS
    if PDL:
        gdc_launch_dependents()
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, LEFT)))
    inside = first + row % OUTPUTS < N
    # Gated: rows of the gate above the same rows of up, which so meet in one thread.
    row = first + row % OUTPUTS + (row // OUTPUTS) * N
    weights = ()
    for i in gl.static_range(AHEAD):
        weights = weights + (_load_piece(weight_ptr, row, inside, i * STEP, K, WARPS, COLUMNS, EXACT, LEFT),)
    if PDL:
        gdc_wait()
    sums = gl.zeros([WARPS, ROWS, TOKENS], gl.float32, MMA)
    squares = gl.zeros([WARPS, COLUMNS, TOKENS], gl.float32, RIGHT)
    following = _load_tokens(x_ptr, tokens, 0, K, WARPS, COLUMNS, TOKENS, RIGHT)
    for i in gl.static_range(PIECES):
        x = following
        if i + 1 < PIECES:
            following = _load_tokens(x_ptr, tokens, (i + 1) * STEP, K, WARPS, COLUMNS, TOKENS, RIGHT)
        if NORM:
            exact = x.to(gl.float32)
            squares += exact * exact
            norm_weight = _load_vector(norm_weight_ptr, i * STEP, WARPS, COLUMNS, RIGHT)
            x = (exact * norm_weight.to(gl.float32)).to(x.dtype)
        sums = mma_v2(weights[i], x, sums)
        if i + AHEAD < PIECES:
            weights = weights + (
                _load_piece(weight_ptr, row, inside, (i + AHEAD) * STEP, K, WARPS, COLUMNS, EXACT, LEFT),
            )
    total = gl.sum(sums, 0)
    OUT: gl.constexpr = gl.SliceLayout(0, MMA)
    if NORM:
        mean = gl.sum(gl.sum(squares, 1), 0) / K
        scale = gl.convert_layout(gl.rsqrt(mean + eps), gl.SliceLayout(0, OUT))
        total = total * scale[None, :]
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(total, [2, OUTPUTS, TOKENS]), [1, 2, 0]))
        total = gate / (1.0 + gl.exp(-gate)) * up
    OUT_LAYOUT: gl.constexpr = total.type.layout
    _finish(
        total,
        first,
        bias_ptr,
        residual_ptr,
        out_ptr,
        tokens,
        TOKENS,
        N,
        OUTPUTS,
        RELU,
        HAS_BIAS,
        HAS_RESIDUAL,
        OUT_LAYOUT,
    )


@gluon.jit
def _finish(
    total,
    first,
    bias_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    TOKENS: gl.constexpr,
    N: gl.constexpr,
    OUTPUTS: gl.constexpr,
    RELU: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Bias, activation, residual, and the store of [OUTPUTS, TOKENS]."""
    output = first + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(1, LAYOUT))
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LAYOUT))
    inside = (output < N)[:, None] & (token < tokens)[None, :]
    if HAS_BIAS:
        total += gl.load(bias_ptr + output, mask=output < N, other=0.0).to(gl.float32)[:, None]
    if RELU:
        total = gl.maximum(total, 0.0)
    place = token[None, :] * N + output[:, None]
    if HAS_RESIDUAL:
        total += gl.load(residual_ptr + place, mask=inside, other=0.0).to(gl.float32)
    gl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=inside)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `small_batch_linear` can and should multiply x [tokens, in_features] with weight.

    Every 16 weight rows read all tokens, and cuBLAS, which shares tokens among more rows, wins where rows are
    very many. On an H200, us by cuBLAS and by this: at 8 tokens 60 and 65 for Llama-3.1-8B's up projection
    (2^27 weights), 32 and 30 for its down projection (2^26); at 16 tokens 14 and 17 for Llama-3.2-1B's down
    projection (2^24), 7.7 and 5.2 for Qwen3-0.6B's (2^21.6).
    """
    tokens, in_features = x.shape
    if not AVAILABLE or not x.is_cuda or tokens > MAX_TOKENS or split(in_features) is None:
        return False
    if x.element_size() != 2:  # these instructions round float32 to TensorFloat32
        return False
    if tokens > 8:
        return weight.numel() <= 1 << 23
    return in_features <= 2048 or weight.numel() <= 1 << 26


def small_batch_linear(
    x: Tensor,
    weight: Tensor,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
    relu: bool = False,
    residual: Tensor | None = None,
    chosen: Split | None = None,
) -> Tensor:
    """All of the module's formulas: x [tokens, in_features], weight [out_features, in_features], contiguous.

    `norm_weight`: RMS norm. `gated`: the weight's first half are the gate's rows; the result is half as wide.
    `residual` [tokens, out_features] is added to in place and returned.
    """
    tokens, in_features = x.shape
    out_features = len(weight) // 2 if gated else len(weight)
    out = residual
    if out is None:
        out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    shares = chosen or split(in_features, gated)
    assert shares is not None, f"{in_features} columns"
    outputs = shares.rows // 2 if gated else shares.rows
    _small_batch_kernel[(-(-out_features // outputs),)](
        x,
        x if norm_weight is None else norm_weight,
        weight,
        x if bias is None else bias,
        out,
        out,
        tokens,
        eps,
        TOKENS=8 if tokens <= 8 else 16,
        N=out_features,
        K=in_features,
        NORM=norm_weight is not None,
        GATED=gated,
        RELU=relu,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=shares.rows,
        WARPS=shares.num_warps,
        COLUMNS=shares.columns,
        AHEAD=shares.ahead,
        num_warps=shares.num_warps,
        **pdl_options(x),
    )
    return out
