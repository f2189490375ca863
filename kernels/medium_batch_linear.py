"""The linear layers of a decode step for batches of 17 to 128 tokens, by Hopper's warpgroup instructions.

    y = x W^T + b,   r += x W^T + b,   y = silu(s * x G^T) * (s * x U^T)

with W = [G; U] and s the scale of x's RMS norm, whose weight is in W already.

A product of so few tokens is bound by reading W, so W is the instructions' left side (64 rows at a time) and
the tokens are its columns: a batch of 32 costs a quarter of one of 128. A program owns `rows` rows of W and
brings W and x through a ring of tiles in shared memory by bulk copies; the first tiles of W are under way
before the wait for the kernel in front (see `pdl`). What W costs beside its own bytes is x, which every
program reads from the second-level cache: as many bytes again at 128 rows and 128 tokens.

Where there are too few rows for all processors, programs share the columns (`Tiling.shares`). Each leaves
its sums in memory, waits for the others' and adds up a part of the tokens, always in the same order. They
wait for each other in a loop, so there are never more of them than run at once.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .hopper import (
    AVAILABLE,
    descriptor,
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
    """A program's part of a product."""

    rows: int
    """Of W: 64 or 128. Gated: 128, half of them the gate's."""
    tokens: int
    """32, 64 or 128; a larger batch is several programs' per row."""
    block_k: int
    stages: int
    """Tiles of `block_k` columns in the ring."""
    shares: int = 1
    """Programs that share the columns of the same rows."""


MAX_TOKENS = 128
"""Largest batch; with more, cuBLAS is bound by arithmetic and near the limit. 16: cuBLAS serves these."""
_LONG = 8192
"""Columns from which up to 2048 rows meet 193 to 256 tokens too: cuBLAS shares such products less well."""
_WARPS = 4
_PROCESSORS = 132
_SHARED = 223 * 1024
"""Bytes of shared memory of a processor for rings."""
_BESIDE_OTHERS = 150 * 1024
"""The same where programs of the next kernel should find room beside a program of this one."""


@cache
def tiling(
    tokens: int, out_features: int, in_features: int, gated: bool = False, leaves_room: bool = False
) -> Tiling | None:
    """How to multiply so many tokens with a matrix; None where cuBLAS should.

    `leaves_room`: attention comes next. None of its programs could start early beside a ring that takes all
    shared memory: with 128 rows of Qwen2.5-1.5B that cost 9 us a layer.

    The tiling whose busiest processor has the fewest bytes to read. On an H200 it is the fastest or within
    3 per cent of it for nine in ten of the matrices of four models with 32, 64 and 128 tokens.
    """
    if not AVAILABLE or in_features % 8:
        return None
    if 192 < tokens <= 256 and in_features >= _LONG and out_features <= 2048 and not gated:
        return Tiling(128, 128, 64, 6, 4)
    if not 16 < tokens <= MAX_TOKENS:
        return None
    widest = max(32, 1 << (tokens - 1).bit_length())
    found = []
    for rows, block_tokens in product((64, 128), (widest, widest // 2, widest // 4)):
        tiles = -(-out_features // (rows // 2 if gated else rows)) * -(-tokens // block_tokens)
        if block_tokens < 32 or (rows == 64 and gated):  # gate and up meet in one thread
            continue
        for shares in (1, 2, 4, 8):
            programs = tiles * shares
            if shares > 1 and (gated or rows > 64 or programs > _PROCESSORS or in_features < 128 * shares):
                break
            cost = _cost(rows, block_tokens, in_features, shares, programs)
            found.append((cost, rows, block_tokens, shares, programs))
    _, rows, block_tokens, shares, programs = min(found)
    room = _SHARED if programs <= _PROCESSORS else _SHARED // 2
    if leaves_room and in_features < 2048:  # where it was measured
        room = min(room, _BESIDE_OTHERS)
    return _with_ring(rows, block_tokens, in_features, shares, room)


def _cost(rows: int, block_tokens: int, in_features: int, shares: int, programs: int) -> float:
    """In bytes that a processor reads meanwhile; about 70 in a nanosecond."""
    cost = (rows + block_tokens) * in_features * 2 / shares * -(-programs // _PROCESSORS)
    return cost if shares == 1 else cost + 30_000 + 20 * rows * block_tokens


def _with_ring(rows: int, block_tokens: int, in_features: int, shares: int, room: int) -> Tiling:
    """With as large a ring as has room."""
    stage = (rows + block_tokens) * 2
    block_k = 128 if 4 * 128 * stage <= room and block_tokens < 128 else 64
    steps = -(-in_features // block_k) // shares
    stages = min(room // (block_k * stage), 8, max(steps, 2))
    return Tiling(rows, block_tokens, block_k, stages, shares)


def chosen(x: Tensor, weight: Tensor, gated: bool = False, leaves_room: bool = False) -> Tiling | None:
    """The tiling for x [tokens, in_features]; None where this kernel cannot or should not multiply."""
    if not multiplies(x, weight):
        return None
    out_features = len(weight) // 2 if gated else len(weight)
    return tiling(len(x), out_features, x.shape[1], gated, leaves_room)


def parts_of(tiling: Tiling, out_features: int) -> int:
    """Parts in which a product leaves the sums of its results' squares."""
    return -(-out_features // tiling.rows)


@gluon.jit
def _load_weights(weight_desc, buffer, bar, first, k, N: gl.constexpr, GATED: gl.constexpr, pred):
    """`buffer`'s rows of W, from column `k` on; gated, as many of the gate above the same of up."""
    if GATED:
        HALF: gl.constexpr = buffer.shape[0] // 2
        tma.async_copy_global_to_shared(weight_desc, [first, k], bar, buffer.slice(0, HALF), pred)
        tma.async_copy_global_to_shared(weight_desc, [N + first, k], bar, buffer.slice(HALF, HALF), pred)
    else:
        tma.async_copy_global_to_shared(weight_desc, [first, k], bar, buffer, pred)


@gluon.jit
def _scales(
    squares_ptr, tokens, first_token, eps, K, PARTS: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr
):
    """Of x's norm, [TOKENS], from the parts' sums of squares."""
    COLUMNS: gl.constexpr = TOKENS // 4 if TOKENS < 128 else 32
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [32 // COLUMNS, COLUMNS], [WARPS, 1], [1, 0])
    AT_ONCE: gl.constexpr = 32
    token = first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LAYOUT))
    total = gl.zeros([AT_ONCE, TOKENS], gl.float32, LAYOUT)
    for at in gl.static_range(0, PARTS, AT_ONCE):
        part = at + gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, LAYOUT))
        inside = (part < PARTS)[:, None] & (token < tokens)[None, :]
        total += gl.load(squares_ptr + part[:, None] * tokens + token[None, :], mask=inside, other=0.0)
    return gl.rsqrt(gl.sum(total, 0) / K + eps)


@gluon.jit
def _medium_batch_kernel(
    x_desc,  # [tokens, K]
    weight_desc,  # [N, K]; gated: [2 * N, K]
    bias_ptr,  # [N]
    residual_ptr,  # [tokens, N]; may be out_ptr
    out_ptr,  # [tokens, N]
    sums_ptr,  # float32 [tiles, SHARES, TOKENS, ROWS]
    arrivals_ptr,  # int32 [tiles], zero
    parts_ptr,  # float32 [PARTS, tokens], sums of x's squares
    squares_ptr,  # float32 [tiles, tokens], sums of the results' squares
    tokens,
    eps,
    N: gl.constexpr,
    K: gl.constexpr,
    GATED: gl.constexpr,
    PARTS: gl.constexpr,  # 0: no norm
    SQUARES: gl.constexpr,  # leave the results' squares
    RELU: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SHARES: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    OUTPUTS: gl.constexpr = ROWS // 2 if GATED else ROWS
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BYTES: gl.constexpr = (ROWS + TOKENS) * BLOCK_K * 2
    ACC: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, TOKENS, 16]
    )
    dtype: gl.constexpr = x_desc.dtype
    weights = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], weight_desc.layout)
    x = gl.allocate_shared_memory(dtype, [STAGES, TOKENS, BLOCK_K], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    first = gl.program_id(0) * OUTPUTS
    share = gl.program_id(1)
    first_token = gl.program_id(2) * TOKENS
    begin = STEPS * share // SHARES
    steps = STEPS * (share + 1) // SHARES - begin
    if PDL:
        gdc_launch_dependents()
    for i in gl.static_range(STAGES):
        bar = bars.index(i)
        mbarrier.expect(bar, BYTES, i < steps)
        _load_weights(weight_desc, weights.index(i), bar, first, (begin + i) * BLOCK_K, N, GATED, i < steps)
    if PDL:
        gdc_wait()
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(
            x_desc, [first_token, (begin + i) * BLOCK_K], bars.index(i), x.index(i), i < steps
        )
    # What this program will store, and what is added to it then: loaded now, it is there in time.
    OUT: gl.constexpr = _out_layout(SHARES, WARPS)
    output = first + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(0, OUT))
    taken = share * (TOKENS // SHARES) + gl.arange(0, TOKENS // SHARES, layout=gl.SliceLayout(1, OUT))
    token = first_token + taken
    inside = (token < tokens)[:, None] & (output < N)[None, :]
    place = token[:, None] * N + output[None, :]
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + place, mask=inside, other=0.0)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + output, mask=output < N, other=0.0)
    sums = gl.zeros([ROWS, TOKENS], gl.float32, ACC)
    if PARTS > 0:
        scale = _scales(parts_ptr, tokens, first_token, eps, K, PARTS, TOKENS, WARPS)
    for i in range(steps):
        stage = i % STAGES
        mbarrier.wait(bars.index(stage), (i // STAGES) & 1)
        sums = warpgroup_mma(weights.index(stage), x.index(stage).permute((1, 0)), sums, is_async=True)
        # The product before this one has ended in all warps: its place in the ring takes a new tile.
        sums = warpgroup_mma_wait(1, deps=(sums,))
        gl.thread_barrier()
        following = i - 1 + STAGES
        more = (i > 0) & (following < steps)
        free = (i + STAGES - 1) % STAGES
        bar = bars.index(free)
        k = (begin + following) * BLOCK_K
        mbarrier.expect(bar, BYTES, more)
        _load_weights(weight_desc, weights.index(free), bar, first, k, N, GATED, more)
        tma.async_copy_global_to_shared(x_desc, [first_token, k], bar, x.index(free), more)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    if PARTS > 0:
        sums = sums * gl.convert_layout(scale, gl.SliceLayout(0, ACC))[None, :]
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(sums, [2, OUTPUTS, TOKENS]), [1, 2, 0]))
        sums = gate / (1.0 + gl.exp(-gate)) * up
    if SHARES == 1:
        sums = gl.convert_layout(gl.permute(sums, [1, 0]), OUT)
    else:
        tile = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
        sums = _add_up(sums, sums_ptr, arrivals_ptr + tile, tile, share, taken, ROWS, TOKENS, SHARES, OUT)
    if HAS_BIAS:
        sums += bias.to(gl.float32)[None, :]
    if RELU:
        sums = gl.maximum(sums, 0.0)
    if HAS_RESIDUAL:
        sums += residual.to(gl.float32)
    rounded = sums.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + place, rounded, mask=inside)
    if SQUARES:
        sums = gl.where(inside, rounded.to(gl.float32), 0.0)
        gl.store(squares_ptr + gl.program_id(0) * tokens + token, gl.sum(sums * sums, 1), mask=token < tokens)


@gluon.constexpr_function
def _out_layout(shares, warps):
    """Of [tokens, outputs]: neighbours in a row in one thread."""
    if shares == 1:
        return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])
    return gl.BlockedLayout([1, 4], [1, 32], [warps, 1], [1, 0])


@gluon.jit
def _add_up(
    sums,
    sums_ptr,
    arrivals,
    tile,
    share,
    taken,
    ROWS: gl.constexpr,
    TOKENS: gl.constexpr,
    SHARES: gl.constexpr,
    OUT: gl.constexpr,
):
    """The sums over all columns of this share's tokens `taken`, [TOKENS // SHARES, ROWS]."""
    ACC: gl.constexpr = sums.type.layout
    sums_ptr += tile * SHARES * TOKENS * ROWS
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
    token = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, ACC))
    gl.store(sums_ptr + share * TOKENS * ROWS + token[None, :] * ROWS + row[:, None], sums)
    gl.thread_barrier()
    gl.atomic_add(arrivals, 1, sem="release", scope="gpu")
    while gl.atomic_add(arrivals, 0, sem="acquire", scope="gpu") < SHARES:
        pass
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, OUT))
    place = sums_ptr + taken[:, None] * ROWS + row[None, :]
    total = gl.load(place, cache_modifier=".cg")
    for i in gl.static_range(1, SHARES):
        total += gl.load(place + i * TOKENS * ROWS, cache_modifier=".cg")
    # The last to leave leaves zero for the next product.
    if gl.atomic_add(arrivals, 1, sem="relaxed", scope="gpu") == 2 * SHARES - 1:
        gl.store(arrivals, 0)
    return total


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters, zero between products. One stream's: products that overlap would count together."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


def medium_batch_linear(
    x: Tensor,
    weight: Tensor,
    *,
    tiling: Tiling,
    bias: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    relu: bool = False,
    residual: Tensor | None = None,
    leave_squares: Tensor | None = None,
) -> Tensor:
    """All of the module's formulas: x [tokens, in_features], weight [out_features, in_features], contiguous.

    `squares`, float32 [parts, tokens], in all the sums of x's squares: the scale of x's RMS norm (with `eps`)
    is applied; None: no norm. `gated`: the weight's first half are the gate's rows; the result is half as
    wide. `residual` [tokens, out_features] is added to in place and returned. `leave_squares`, float32
    [`parts_of(tiling, out_features)`, tokens]: is given the sums of the result's squares.
    """
    tokens, in_features = x.shape
    out_features = len(weight) // 2 if gated else len(weight)
    out = residual
    if out is None:
        out = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    rows, block_tokens, block_k, stages, shares = tiling
    outputs = rows // 2 if gated else rows
    tiles, token_tiles = -(-out_features // outputs), -(-tokens // block_tokens)
    sums = out
    if shares > 1:
        size = token_tiles * tiles * shares * block_tokens * rows
        sums = torch.empty(size, dtype=torch.float32, device=x.device)
    _medium_batch_kernel[tiles, shares, token_tiles](
        descriptor(x, block_tokens, block_k),
        descriptor(weight, outputs, block_k),
        x if bias is None else bias,
        out,
        out,
        sums,
        _arrivals(x.device),
        out if squares is None else squares,
        out if leave_squares is None else leave_squares,
        tokens,
        eps,
        N=out_features,
        K=in_features,
        GATED=gated,
        PARTS=0 if squares is None else len(squares),
        SQUARES=leave_squares is not None,
        RELU=relu,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ROWS=rows,
        TOKENS=block_tokens,
        BLOCK_K=block_k,
        STAGES=stages,
        SHARES=shares,
        WARPS=_WARPS,
        num_warps=_WARPS,
        **pdl_options(x),
    )
    return out
