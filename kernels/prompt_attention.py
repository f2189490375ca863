"""Attention of prompts by Hopper's warpgroup instructions: whole prompts, chunks, and any mix, in one launch.

A tile is some consecutive query tokens of one row; a program takes one head of one tile after the other, long
ones first. It consists of a producer, one warp that brings queries, keys and values into rings in shared
memory by bulk copies, and of consumers, groups of four warps that have 64 of the tile's tokens each. Keys and
values of tokens that are in the step come from its projections, in large pieces; earlier ones come from the
paged cache, block by block. A consumer starts the product with the next keys before it adds up the values of
the last, and turns to the next keys' softmax while that is under way. Consumers wait for nobody but the
producer, so that one's softmax overlaps another's products too.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .hopper import (
    AVAILABLE,
    TensorDescriptor,
    async_load,
    descriptor,
    fence_async_shared,
    gl,
    gluon,
    is_hopper,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_ROWS = 64
"""Query tokens of a consumer: what a group of four warps multiplies at once."""


class Tuning(NamedTuple):
    """What a program consists of."""

    consumers: int
    """2 or 3"""
    block: int
    """Keys at a time."""
    stages: int
    """Blocks in each ring, of keys and of values: at least 2."""
    registers: int
    """Of each of a consumer's threads."""

    @property
    def tile_tokens(self) -> int:
        """Query tokens of a tile."""
        return self.consumers * _ROWS


_TUNINGS = {64: Tuning(3, 128, 4, 160), 128: Tuning(2, 128, 2, 240)}
"""By head_dim: the fastest on an H200 for 4 prompts of 4096 tokens."""


class PromptCache(NamedTuple):
    """A layer's paged cache as this kernel wants to see it."""

    keys: TensorDescriptor
    values: TensorDescriptor
    block_size: int
    kv_heads: int
    tuning: Tuning


def prompt_cache(k_cache: Tensor, v_cache: Tensor, tuning: Tuning | None = None) -> PromptCache | None:
    """The paged cache [blocks, block_size, kv_heads, head_dim], dense; None where only `paged_prefill` can.

    `tuning`: None for the best.
    """
    blocks, block_size, kv_heads, head_dim = k_cache.shape
    if not AVAILABLE or not k_cache.is_cuda or not is_hopper(k_cache.device):
        return None
    if k_cache.element_size() != 2 or block_size < 8 or head_dim not in _TUNINGS:
        return None
    used = tuning or _TUNINGS[head_dim]
    piece = min(block_size, used.block)
    keys, values = (descriptor(x.view(blocks * block_size, -1), piece, head_dim) for x in (k_cache, v_cache))
    return PromptCache(keys, values, block_size, kv_heads, used)


# --- the producer -------------------------------------------------------------------------------------


@gluon.jit
def _next_tile(turn, tiles_ptr, items, heads):
    """What this program takes at a turn: the head, the tile's row, or -1 for nothing, and its first token.

    There and back again, because later tiles are shorter.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = programs - 1 - place
    item = turn * programs + place
    tile = tiles_ptr + item // heads * 2
    inside = item < items
    return item % heads, gl.load(tile, mask=inside, other=-1), gl.load(tile + 1, mask=inside, other=0)


@gluon.jit
def _load_block(
    qkv_desc, cache_desc, target, bar, table, first_key, tokens, in_step, qkv_row, qkv_column, cache_column,
    BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """A block of keys, or values, to `target` [BLOCK, HEAD_DIM]."""
    BLOCK: gl.constexpr = target.shape[0]
    mbarrier.expect(bar, BLOCK * target.shape[1] * 2)
    if in_step:
        PART: gl.constexpr = qkv_desc.block_type.shape[0]
        for i in gl.static_range(0, BLOCK, PART):
            async_load(qkv_desc, [qkv_row + i, qkv_column], bar, target.slice(i, PART))
    else:
        PIECE: gl.constexpr = cache_desc.block_type.shape[0]
        for i in gl.static_range(0, BLOCK, PIECE):
            key = first_key + i
            block = gl.load(table + key // BLOCK_SIZE, mask=key < tokens, other=0)
            slot = block * BLOCK_SIZE + key % BLOCK_SIZE
            async_load(cache_desc, [slot, cache_column], bar, target.slice(i, PIECE))


@gluon.jit
def _produce(descriptors, rings, step, BLOCK_SIZE: gl.constexpr):
    """Fill the rings: for each tile its queries, then its blocks of keys and values, the last first."""
    qkv_desc, k_desc, v_desc = descriptors
    q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    block_tables_ptr, table_stride, table_rows_ptr, query_start_ptr, seq_lens_ptr, tiles_ptr = step[:6]
    items, heads, kv_heads = step[6:]
    CONSUMERS: gl.constexpr = q.shape[0]
    ROWS: gl.constexpr = q.shape[1]
    STAGES: gl.constexpr = k.shape[0]
    BLOCK: gl.constexpr = k.shape[1]
    HEAD_DIM: gl.constexpr = k.shape[2]
    Q_BYTES: gl.constexpr = CONSUMERS * ROWS * HEAD_DIM * 2
    filled = 0
    turn = 0
    head, row, first = _next_tile(turn, tiles_ptr, items, heads)
    while row >= 0:
        start = gl.load(query_start_ptr + row)
        tokens = gl.load(seq_lens_ptr + row)
        context = tokens - (gl.load(query_start_ptr + row + 1) - start)
        table = block_tables_ptr + gl.load(table_rows_ptr + row).to(gl.int64) * table_stride
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, Q_BYTES)
        for i in gl.static_range(CONSUMERS):
            query = start + first + i * ROWS
            async_load(qkv_desc, [query, head * HEAD_DIM], q_full, q.index(i))
        kv_head = head // (heads // kv_heads)
        column = kv_head * HEAD_DIM
        k_column = (heads + kv_head) * HEAD_DIM
        v_column = (heads + kv_heads + kv_head) * HEAD_DIM
        end = gl.minimum(context + first + CONSUMERS * ROWS, tokens)
        blocks = (end + BLOCK - 1) // BLOCK
        for i in range(blocks):
            key = (blocks - 1 - i) * BLOCK
            stage = filled % STAGES
            empty = ((filled // STAGES) & 1) ^ 1
            in_step = key >= context
            qkv_row = start + key - context
            mbarrier.wait(k_empty.index(stage), empty)
            _load_block(
                qkv_desc, k_desc, k.index(stage), k_full.index(stage), table, key, tokens, in_step, qkv_row,
                k_column, column, BLOCK_SIZE,
            )  # fmt: skip
            mbarrier.wait(v_empty.index(stage), empty)
            _load_block(
                qkv_desc, v_desc, v.index(stage), v_full.index(stage), table, key, tokens, in_step, qkv_row,
                v_column, column, BLOCK_SIZE,
            )  # fmt: skip
            filled += 1
        turn += 1
        head, row, first = _next_tile(turn, tiles_ptr, items, heads)


# --- a consumer ---------------------------------------------------------------------------------------


@gluon.jit
def _exp2(x):
    """2 ** x; where that is denormal zero, which spares three instructions."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _pack(weights, dtype: gl.constexpr):
    """Neighbours rounded and put into 32 bits. The compiler carries 16 bit numbers one in a register."""
    ROWS: gl.constexpr = weights.shape[0]
    PAIRS: gl.constexpr = weights.shape[1] // 2
    TYPE: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    low, high = gl.split(gl.reshape(weights, [ROWS, PAIRS, 2]))
    return gl.inline_asm_elementwise(
        "cvt.rn." + TYPE + ".f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unpack(pairs, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    ROWS: gl.constexpr = pairs.shape[0]
    COLUMNS: gl.constexpr = pairs.shape[1] * 2
    low = pairs.to(gl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.reshape(gl.join(low, high), [ROWS, COLUMNS]), LAYOUT)


@gluon.jit
def _hide(scores, key, position):
    """Scores of later keys become -inf. Of comparisons in Triton the compiler makes bits: dearer."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }",
        "=f,f,r,r", [scores, key, position], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _softmax(scores, highest, scale, first_key, position, MASKED: gl.constexpr):
    """The keys' weights, the highest score by now, and the factor for what has been added up before."""
    if MASKED:
        key = first_key + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
        scores = _hide(scores, key[None, :], position[:, None])
    higher = gl.maximum(highest, gl.max(scores, 1))
    weights = _exp2(scores * scale - (higher * scale)[:, None])
    return weights, higher, _exp2((highest - higher) * scale)


@gluon.jit
def _partial_sums(weights):
    """The sums of the rows' parts that each of four threads has, [ROWS, 4]."""
    ROWS: gl.constexpr = weights.shape[0]
    EIGHTS: gl.constexpr = weights.shape[1] // 8
    return gl.sum(gl.sum(gl.reshape(weights, [ROWS, EIGHTS, 4, 2]), 3), 1)


@gluon.jit
def _wait_full(full, taken, pred=True):
    """Until the block that is the ring's `taken`-th is there."""
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(taken % STAGES), (taken // STAGES) & 1, pred)


@gluon.jit
def _start_scores(q, k, taken):
    """Start the product of the queries with a block of keys, which is there."""
    ROWS: gl.constexpr = q.shape[0]
    BLOCK: gl.constexpr = k.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, SCORES)
    keys = k.index(taken % k.shape[0]).permute((1, 0))
    return warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_sums(sums, pairs, shrink, v, v_full, taken):
    """Start to add a block's values to the sums by now; with the operand, which must last as long."""
    SUMS: gl.constexpr = sums.type.layout
    sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    weights = _unpack(pairs, v.dtype, gl.DotOperandLayout(0, SUMS, 2))
    _wait_full(v_full, taken)
    return warpgroup_mma(weights, v.index(taken % v.shape[0]), sums, is_async=True), weights


@gluon.jit
def _block_step(
    sums, pairs, shrink, highest, total, scale, position, taken, block,
    q, k, v, k_full, k_empty, v_full, v_empty, MASKED: gl.constexpr,
):  # fmt: skip
    """The scores of one block of keys, which is there, and the values of the one before."""
    STAGES: gl.constexpr = k.shape[0]
    BLOCK: gl.constexpr = k.shape[1]
    scores = _start_scores(q, k, taken)
    sums, operand = _start_sums(sums, pairs, shrink, v, v_full, taken - 1)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(taken % STAGES))
    weights, highest, shrink = _softmax(scores, highest, scale, block * BLOCK, position, MASKED)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None]
    total += _partial_sums(weights)
    # Here, because the assembler would otherwise put the wait for the sums in front of the exponentials.
    _wait_full(k_full, taken + 1, block > 0)
    sums, operand = warpgroup_mma_wait(0, deps=(sums, operand))
    mbarrier.arrive(v_empty.index((taken - 1) % STAGES))
    return sums, _pack(weights, v.dtype), shrink, highest, total


@gluon.jit
def _pass(taken, count, k_full, k_empty, v_full, v_empty):
    """Leave so many blocks of the rings unread."""
    STAGES: gl.constexpr = k_full.shape[0]
    for _ in range(count):
        _wait_full(k_full, taken)
        mbarrier.arrive(k_empty.index(taken % STAGES))
        _wait_full(v_full, taken)
        mbarrier.arrive(v_empty.index(taken % STAGES))
        taken += 1
    return taken


@gluon.jit
def _clear(values, count):
    """Zero the rows from `count` on. Nobody's, or another request's, they may be nan, and 0 * nan is nan."""
    HEAD_DIM: gl.constexpr = values.shape[1]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    row = gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, WIDE))
    values.store(gl.where(row[:, None] < count, values.load(WIDE), 0.0))
    fence_async_shared()


@gluon.jit
def _store(sums, total, out_ptr, first, count, head, heads):
    """The first `count` rows, to those of the output from `first` on."""
    ROWS: gl.constexpr = sums.shape[0]
    HEAD_DIM: gl.constexpr = sums.shape[1]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    share = gl.convert_layout(1.0 / gl.sum(total, 1), gl.SliceLayout(1, sums.type.layout))
    result = gl.convert_layout((sums * share[:, None]).to(out_ptr.dtype.element_ty), WIDE)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, WIDE))
    place = ((first + row).to(gl.int64) * heads + head) * HEAD_DIM
    gl.store(out_ptr + place[:, None] + column[None, :], result, mask=(row < count)[:, None])


@gluon.jit
def _consume(rings, step, out_ptr, scale, ME: gl.constexpr):
    """One consumer's part of the program's tiles."""
    q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    query_start_ptr, seq_lens_ptr, tiles_ptr, items, heads, _ = step[3:]
    CONSUMERS: gl.constexpr = q.shape[0]
    ROWS: gl.constexpr = q.shape[1]
    STAGES: gl.constexpr = k.shape[0]
    BLOCK: gl.constexpr = k.shape[1]
    HEAD_DIM: gl.constexpr = k.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    taken = 0
    turn = 0
    head, row, first = _next_tile(turn, tiles_ptr, items, heads)
    while row >= 0:
        start = gl.load(query_start_ptr + row)
        queries = gl.load(query_start_ptr + row + 1) - start
        tokens = gl.load(seq_lens_ptr + row)
        next_head, next_row, next_first = _next_tile(turn + 1, tiles_ptr, items, heads)
        context = tokens - queries
        mine = first + ME * ROWS
        end = gl.minimum(context + first + CONSUMERS * ROWS, tokens)
        my_end = gl.minimum(context + mine + ROWS, tokens)
        if mine >= queries:  # the tile is shorter: as little as possible
            my_end = 1
        block = (my_end + BLOCK - 1) // BLOCK - 1
        mbarrier.wait(q_full, turn & 1)
        taken = _pass(taken, (end + BLOCK - 1) // BLOCK - 1 - block, k_full, k_empty, v_full, v_empty)
        _wait_full(k_full, taken)
        scores = _start_scores(q.index(ME), k, taken)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(taken % STAGES))
        position = context + mine + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        highest = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
        weights, highest, shrink = _softmax(scores, highest, scale, block * BLOCK, position, True)
        total = _partial_sums(weights)
        pairs = _pack(weights, v.dtype)
        sums = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
        if (block + 1) * BLOCK > tokens:
            _wait_full(v_full, taken)
            _clear(v.index(taken % STAGES), tokens - block * BLOCK)
        taken += 1
        _wait_full(k_full, taken, block > 0)
        seen_by_all = (context + mine + 1) // BLOCK
        for _ in range(gl.maximum(block - seen_by_all, 0)):
            block -= 1
            sums, pairs, shrink, highest, total = _block_step(
                sums, pairs, shrink, highest, total, scale, position, taken, block,
                q.index(ME), k, v, k_full, k_empty, v_full, v_empty, True,
            )  # fmt: skip
            taken += 1
        for i in range(block):
            sums, pairs, shrink, highest, total = _block_step(
                sums, pairs, shrink, highest, total, scale, position, taken, block - 1 - i,
                q.index(ME), k, v, k_full, k_empty, v_full, v_empty, False,
            )  # fmt: skip
            taken += 1
        mbarrier.arrive(q_empty)
        sums, operand = _start_sums(sums, pairs, shrink, v, v_full, taken - 1)
        sums, operand = warpgroup_mma_wait(0, deps=(sums, operand))
        mbarrier.arrive(v_empty.index((taken - 1) % STAGES))
        _store(sums, total, out_ptr, start + mine, queries - mine, head, heads)
        turn += 1
        head, row, first = next_head, next_row, next_first


# --- both ---------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["table_stride", "items", "heads", "kv_heads"])
def _prompt_attention_kernel(
    qkv_desc,  # [tokens, (heads + 2 * kv_heads) * HEAD_DIM]
    k_desc,  # [slots, kv_heads * HEAD_DIM]
    v_desc,
    out_ptr,  # [tokens, heads * HEAD_DIM]
    block_tables_ptr,
    table_rows_ptr,
    query_start_ptr,
    seq_lens_ptr,
    tiles_ptr,
    scale,  # times log2(e): the softmax is computed with exp2
    table_stride,
    items,
    heads,
    kv_heads,
    HEAD_DIM: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    CONSUMERS: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = qkv_desc.dtype
    ROWS: gl.constexpr = qkv_desc.block_type.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, HEAD_DIM], dtype)
    q = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], qkv_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_DIM], LAYOUT)
    v = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, HEAD_DIM], LAYOUT)
    q_bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full, q_empty = q_bars.index(0), q_bars.index(1)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    rings = (q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    descriptors = (qkv_desc, k_desc, v_desc)
    step = (
        block_tables_ptr, table_stride, table_rows_ptr, query_start_ptr, seq_lens_ptr, tiles_ptr, items,
        heads, kv_heads,
    )  # fmt: skip
    # The first runs in the kernel's own warps. Their arguments stand here because variables would make the
    # constants among them tensors.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (rings, step, out_ptr, scale, 0)),
                (_consume, (rings, step, out_ptr, scale, 1)),
                (_produce, (descriptors, rings, step, BLOCK_SIZE)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (rings, step, out_ptr, scale, 0)),
                (_consume, (rings, step, out_ptr, scale, 1)),
                (_consume, (rings, step, out_ptr, scale, 2)),
                (_produce, (descriptors, rings, step, BLOCK_SIZE)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def prompt_attention(
    qkv: Tensor,
    cache: PromptCache,
    *,
    block_tables: Tensor,
    table_rows: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    tiles: Tensor,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Causal attention of the query tokens of `tiles` over their rows' sequences.

    Args:
        qkv: [tokens, heads + 2 * kv_heads, head_dim], dense: the step's queries, keys and values, rotated.
        cache: has the step's keys and values too.
        block_tables: int32 [tables, max_blocks]
        table_rows: int32 [rows], each row's entry in `block_tables`.
        query_start: int32 [rows + 1], each row's first token in `qkv`.
        seq_lens: int32 [rows], a row's tokens, of which its query tokens are the last.
        tiles: int32 [count, 2]: a row, and the tile's first query token in it, a multiple of
            `cache.tuning.tile_tokens`. From the first row of -1 on there are none. Those that see the most
            tokens should come first.
        out: [tokens, heads * head_dim], dense. Tokens in no tile stay as they are.

    Returns: `out`.
    """
    tokens, all_heads, head_dim = qkv.shape
    heads = all_heads - 2 * cache.kv_heads
    items = len(tiles) * heads
    _prompt_attention_kernel[(min(_processors(qkv.device), items),)](
        descriptor(qkv.view(tokens, -1), _ROWS, head_dim),
        cache.keys,
        cache.values,
        out,
        block_tables,
        table_rows,
        query_start,
        seq_lens,
        tiles,
        scale * 1.4426950408889634,
        block_tables.stride(0),
        items,
        heads,
        cache.kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=cache.block_size,
        CONSUMERS=cache.tuning.consumers,
        BLOCK=cache.tuning.block,
        STAGES=cache.tuning.stages,
        REGISTERS=cache.tuning.registers,
        num_warps=4,
    )
    return out
