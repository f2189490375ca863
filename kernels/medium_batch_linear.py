"""The linear layers of a decode step for batches of 17 to 128 tokens, by Hopper's warpgroup instructions.

    y = x W^T + b,   r += x W^T + b,   y = silu(s * x G^T) * (s * x U^T)

with W = [G; U] and s the scale of x's RMS norm, whose weight is in W already.

A product of so few tokens is bound by reading W, so W is the instructions' left side (64 rows at a time) and
the tokens are its columns: a batch of 32 costs a quarter of one of 128. A program owns `rows` rows of W and
brings W and x through a ring of tiles in shared memory by bulk copies; the first tiles of W are under way
before the wait for the kernel in front (see `pdl`). What W costs beside its own bytes is x, which every
program reads from the second-level cache: as many bytes again at 128 rows and 128 tokens.

Where there are too few rows for all processors, programs share the columns (`Tiling.shares`). Each keeps its
sums of a part of the tokens, leaves the rest in memory, waits for the others' and adds them up, always in the
same order. They wait for each other in a loop, so there are never more of them than run at once.
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
    async_load,
    barrier,
    descriptor,
    gdc_launch_dependents,
    gdc_wait,
    gl,
    gluon,
    mbarrier,
    multiplies,
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
    """Programs that share the columns of the same rows: a power of two, at most `tokens` / 4."""


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
    3 per cent of it for nine in ten of the matrices of four models, and of a half and a quarter of one, with
    32, 64 and 128 tokens.
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
        filled, _ = _filling(tokens, block_tokens)
        for shares in (1, 2, 4, 8):
            programs = tiles * shares
            if shares > 1 and (programs > _PROCESSORS or in_features < 128 * shares):
                break
            if shares > 1 and (block_tokens == 32 if gated else rows > 64):  # never the fastest
                break
            cost = _cost(rows, block_tokens, filled, in_features, shares, programs)
            found.append((cost, rows, block_tokens, shares, programs))
    _, rows, block_tokens, shares, programs = min(found)
    room = _SHARED if programs <= _PROCESSORS else _SHARED // 2
    if leaves_room and in_features < 2048:  # where it was measured
        room = min(room, _BESIDE_OTHERS)
    filled, box = _filling(tokens, block_tokens)
    wide = block_tokens < 128 or filled > box
    return _with_ring(rows, block_tokens, in_features, shares, room, wide)


def _filling(tokens: int, block_tokens: int) -> tuple[int, int]:
    """Columns of a tile that are tokens, and how many of them are copied at once.

    All at once is fastest (in fours 10 per cent slower), but for a tile that lacks 32 tokens or more: to copy
    rows that x does not have made products of 96 tokens 19 per cent slower than those of 128.
    """
    if -tokens % block_tokens < 32:
        return block_tokens, block_tokens
    if block_tokens == 128 and tokens <= 96:
        return 96, 32
    return block_tokens, block_tokens // 2


def _cost(rows: int, block_tokens: int, filled: int, in_features: int, shares: int, programs: int) -> float:
    """In bytes that a processor reads meanwhile; about 70 in a nanosecond."""
    cost = (rows + filled) * in_features * 2 / shares * -(-programs // _PROCESSORS)
    return cost if shares == 1 else cost + 30_000 + 20 * rows * block_tokens


def _with_ring(rows: int, block_tokens: int, in_features: int, shares: int, room: int, wide: bool) -> Tiling:
    """With as large a ring as has room. `wide`: of fewer and wider tiles, that is fewer copies."""
    stage = (rows + block_tokens) * 2
    block_k = 128 if wide and 4 * 128 * stage <= room else 64
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
        async_load(weight_desc, [first, k], bar, buffer.slice(0, HALF), pred)
        async_load(weight_desc, [N + first, k], bar, buffer.slice(HALF, HALF), pred)
    else:
        async_load(weight_desc, [first, k], bar, buffer, pred)


@gluon.jit
def _load_tokens(x_desc, buffer, bar, first_token, tokens, k, FILLED: gl.constexpr, pred):
    """The tile of x that begins with `first_token`, in boxes; see `_token_of`."""
    BOX: gl.constexpr = x_desc.block_shape[0]
    for box in gl.static_range(FILLED // BOX):
        begin = first_token + box * BOX
        if FILLED > BOX:
            begin = gl.minimum(begin, tokens - BOX)
        async_load(x_desc, [begin, k], bar, buffer.slice(box * BOX, BOX), pred)


@gluon.jit
def _token_of(column, first_token, tokens, BOX: gl.constexpr, FILLED: gl.constexpr):
    """The token in a tile's column, and whether it is that column's to store.

    Of several boxes, one that would reach past the last token ends with it instead, and brings tokens that
    other columns have too. Columns from `FILLED` on hold whatever memory held.
    """
    if BOX == FILLED:
        return first_token + column, first_token + column < tokens
    begin = first_token + column // BOX * BOX
    token = gl.minimum(begin, tokens - BOX) + column % BOX
    return token, (token >= begin) & (column < FILLED)


@gluon.jit
def _scales(token, wanted, squares_ptr, tokens, eps, K, PARTS: gl.constexpr, LAYOUT: gl.constexpr):
    """Of x's norm, for some tokens, from the parts' sums of squares."""
    AT_ONCE: gl.constexpr = 32
    total = gl.zeros([AT_ONCE, token.shape[0]], gl.float32, LAYOUT)
    for at in gl.static_range(0, PARTS, AT_ONCE):
        part = at + gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, LAYOUT))
        inside = (part < PARTS)[:, None] & wanted[None, :]
        total += gl.load(squares_ptr + part[:, None] * tokens + token[None, :], mask=inside, other=0.0)
    return gl.rsqrt(gl.sum(total, 0) / K + eps)


@gluon.constexpr_function
def _scales_layout(tokens, warps):
    """Of [parts, tokens]."""
    columns = min(max(tokens // 4, 1), 32)
    return gl.BlockedLayout([1, 4], [32 // columns, columns], [warps, 1], [1, 0])


@gluon.jit
def _medium_batch_kernel(
    x_desc,  # [tokens, K]
    weight_desc,  # [N, K]; gated: [2 * N, K]
    bias_ptr,  # [N]
    residual_ptr,  # [tokens, N]; may be out_ptr
    out_ptr,  # [tokens, N]
    sums_ptr,  # float32 [tiles, SHARES * TOKENS * ROWS]
    arrivals_ptr,  # int32 [tiles], multiples of 8
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
    FILLED: gl.constexpr,  # columns of a tile that are tokens
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SHARES: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    OUTPUTS: gl.constexpr = ROWS // 2 if GATED else ROWS
    TAKEN: gl.constexpr = TOKENS // SHARES
    BOX: gl.constexpr = x_desc.block_shape[0]
    STEPS: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BYTES: gl.constexpr = (ROWS + FILLED) * BLOCK_K * 2
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
    first_token = gl.program_id(2) * FILLED
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
        k = (begin + i) * BLOCK_K
        _load_tokens(x_desc, x.index(i), bars.index(i), first_token, tokens, k, FILLED, i < steps)
    # What this program will store, and what is added to it then: loaded now, it is there in time.
    OUT: gl.constexpr = _out_layout(TAKEN, WARPS)
    output = first + gl.arange(0, OUTPUTS, layout=gl.SliceLayout(0, OUT))
    taken = _taken(gl.arange(0, TAKEN, layout=gl.SliceLayout(1, OUT)), share)
    token, stored = _token_of(taken, first_token, tokens, BOX, FILLED)
    inside = stored[:, None] & (output < N)[None, :]
    place = token[:, None] * N + output[None, :]
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + place, mask=inside, other=0.0)
    if HAS_BIAS:
        bias = gl.load(bias_ptr + output, mask=output < N, other=0.0)
    sums = gl.zeros([ROWS, TOKENS], gl.float32, ACC)
    SCALED: gl.constexpr = _scales_layout(TAKEN, WARPS)
    scaled = _taken(gl.arange(0, TAKEN, layout=gl.SliceLayout(0, SCALED)), share)
    scaled, wanted = _token_of(scaled, first_token, tokens, BOX, FILLED)
    if PARTS > 0 and SHARES == 1:
        scale = _scales(scaled, wanted, parts_ptr, tokens, eps, K, PARTS, SCALED)
    for i in range(steps):
        stage = i % STAGES
        mbarrier.wait(bars.index(stage), (i // STAGES) & 1)
        sums = warpgroup_mma(weights.index(stage), x.index(stage).permute((1, 0)), sums, is_async=True)
        # The product before this one has ended in all warps: its place in the ring takes a new tile.
        sums = warpgroup_mma_wait(1, deps=(sums,))
        barrier()
        following = i - 1 + STAGES
        more = (i > 0) & (following < steps)
        free = (i + STAGES - 1) % STAGES
        bar = bars.index(free)
        k = (begin + following) * BLOCK_K
        mbarrier.expect(bar, BYTES, more)
        _load_weights(weight_desc, weights.index(free), bar, first, k, N, GATED, more)
        _load_tokens(x_desc, x.index(free), bar, first_token, tokens, k, FILLED, more)
    sums = warpgroup_mma_wait(0, deps=(sums,))
    if SHARES > 1:
        tile = gl.program_id(2) * gl.num_programs(0) + gl.program_id(0)
        sums_ptr += tile * SHARES * TOKENS * ROWS
        sums = _leave(sums, sums_ptr, share, SHARES, WARPS)
        arrived = _arrive(arrivals_ptr + tile, SHARES)
        if PARTS > 0:  # while the others arrive
            scale = _scales(scaled, wanted, parts_ptr, tokens, eps, K, PARTS, SCALED)
        _wait_for_all(arrivals_ptr + tile, arrived, SHARES)
        sums = _add_up(sums, sums_ptr, share, ROWS, SHARES, WARPS)
    if PARTS > 0:
        sums = sums * gl.convert_layout(scale, gl.SliceLayout(0, sums.type.layout))[None, :]
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(sums, [2, OUTPUTS, TAKEN]), [1, 2, 0]))
        sums = gate / (1.0 + gl.exp(-gate)) * up
    sums = gl.convert_layout(gl.permute(sums, [1, 0]), OUT)
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
        gl.store(squares_ptr + gl.program_id(0) * tokens + token, gl.sum(sums * sums, 1), mask=stored)


@gluon.constexpr_function
def _out_layout(tokens, warps):
    """Of [tokens, outputs]: neighbours in a row in one thread."""
    if tokens < 2 * warps:
        return gl.BlockedLayout([1, 2], [1, 32], [warps, 1], [1, 0])
    if tokens < 4 * warps:
        return gl.BlockedLayout([1, 4], [2, 16], [warps, 1], [1, 0])
    return gl.BlockedLayout([1, 8], [4, 8], [warps, 1], [1, 0])


@gluon.jit
def _taken(i, share):
    """The tile's column that is the i-th of this share's: a thread's sums are of 2 columns of every 8."""
    TAKEN: gl.constexpr = i.shape[0]
    if TAKEN < 8:
        return share // 2 * 8 + share % 2 + 2 * i
    return share * TAKEN + i


@gluon.constexpr_function
def _pieces_layout(taken, warps):
    """Of [shares, numbers of a thread / vector, threads * vector], the sums in the order of threads."""
    vector = 4 if taken >= 8 else 2
    return gl.BlockedLayout([1, 1, vector], [1, 1, 32], [1, 1, warps], [2, 1, 0])


@gluon.jit
def _leave(sums, parts, share, SHARES: gl.constexpr, WARPS: gl.constexpr):
    """Each thread leaves its sums of the other shares' tokens in memory and returns those of its own.

    sums: [ROWS, TOKENS], in a thread of rows 0 and 8 of 16 and of 2 neighbouring tokens, again for every 8
    tokens and 64 rows. Memory holds them in the order of threads: [of whose tokens, whose sums, ...].
    """
    ROWS: gl.constexpr = sums.shape[0]
    TAKEN: gl.constexpr = sums.shape[1] // SHARES
    LAYOUT: gl.constexpr = _pieces_layout(TAKEN, WARPS)
    WIDE: gl.constexpr = (128 if TAKEN >= 8 else 64) * WARPS
    LONG: gl.constexpr = ROWS * TAKEN // WIDE
    if TAKEN >= 8:
        pieces = gl.reshape(sums, [ROWS // 64, WARPS, 2, 8, SHARES, TAKEN // 8, 4, 2])
        pieces = gl.permute(pieces, [4, 0, 5, 1, 3, 6, 2, 7])
    else:
        pieces = gl.reshape(sums, [ROWS // 64, WARPS, 2, 8, SHARES // 2, 4, 2])
        pieces = gl.permute(pieces, [4, 6, 0, 1, 3, 5, 2])
    pieces = gl.convert_layout(gl.reshape(pieces, [SHARES, LONG, WIDE]), LAYOUT, assert_trivial=True)
    whose = gl.arange(0, SHARES, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, LONG, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    column = gl.arange(0, WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    place = ((whose * SHARES + share) * LONG + row) * WIDE + column
    gl.store(parts + place, pieces, mask=whose != share)
    return gl.sum(gl.where(whose == share, pieces, 0.0), 0)


@gluon.jit
def _add_up(own, parts, share, ROWS: gl.constexpr, SHARES: gl.constexpr, WARPS: gl.constexpr):
    """The sums [ROWS, tokens of this share] over all columns, of what `_leave` left and returned."""
    LONG: gl.constexpr = own.shape[0]
    WIDE: gl.constexpr = own.shape[1]
    TAKEN: gl.constexpr = LONG * WIDE // ROWS
    row = gl.arange(0, LONG, layout=gl.SliceLayout(1, own.type.layout))[:, None]
    column = gl.arange(0, WIDE, layout=gl.SliceLayout(0, own.type.layout))[None, :]
    for i in gl.static_range(1, SHARES):
        other = share * SHARES + (share + i) % SHARES
        own += gl.load(parts + (other * LONG + row) * WIDE + column, cache_modifier=".cg")
    if TAKEN >= 8:
        own = gl.permute(gl.reshape(own, [ROWS // 64, TAKEN // 8, WARPS, 8, 4, 2, 2]), [0, 2, 5, 3, 1, 4, 6])
    else:
        own = gl.permute(gl.reshape(own, [ROWS // 64, WARPS, 8, 4, 2]), [0, 1, 4, 2, 3])
    return gl.reshape(own, [ROWS, TAKEN])


@gluon.jit
def _arrive(arrivals, SHARES: gl.constexpr):
    """Every product counts up to the next multiple of 8, whatever its shares: none has to begin from zero."""
    barrier()
    return gl.atomic_add(arrivals, 8 // SHARES, sem="acq_rel", scope="gpu")


@gluon.jit
def _wait_for_all(arrivals, arrived, SHARES: gl.constexpr):
    all_arrived = (arrived | 7) + 1
    arrived += 8 // SHARES
    while arrived - all_arrived < 0:
        arrived = gl.atomic_add(arrivals, 0, sem="acquire", scope="gpu")


@cache
def _arrivals(device: torch.device) -> Tensor:
    """Counters. One stream's: products that overlap would count together."""
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
    filled, box = _filling(tokens, block_tokens)
    sums = out
    if shares > 1:
        size = token_tiles * tiles * shares * block_tokens * rows
        sums = torch.empty(size, dtype=torch.float32, device=x.device)
    _medium_batch_kernel[tiles, shares, token_tiles](
        descriptor(x, box, block_k),
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
        FILLED=filled,
        BLOCK_K=block_k,
        STAGES=stages,
        SHARES=shares,
        WARPS=_WARPS,
        num_warps=_WARPS,
        **pdl_options(x),
    )
    return out
