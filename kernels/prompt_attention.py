"""Attention of prompts by Hopper's warpgroup instructions: whole prompts, chunks, and any mix, in one launch.

A program walks over pieces of work: 64 query tokens for each of its consumers, of one row and one head. A
producer warp brings queries, keys and values into rings of tiles in shared memory. Keys and values that the
step itself has computed come from its projections in large pieces, earlier ones from the paged cache, block
by block. Each consumer, a group of four warps, starts the product with the next keys before it turns to the
softmax of the last, so that the matrix units have work meanwhile; consumers wait for nobody but the producer.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # an experimental part of Triton may move; then `paged_prefill` serves prompts
    AVAILABLE = False
    gluon = SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f), constexpr_function=lambda function: function)
    gl = fence_async_shared = mbarrier = tma = warpgroup_mma = warpgroup_mma_wait = TensorDescriptor = None
else:
    AVAILABLE = True

ROWS = 64
"""Query tokens of a consumer: what a warp group multiplies at once."""


class Tuning(NamedTuple):
    """How a program works."""

    consumers: int
    block: int
    """Keys at a time."""
    stages: int
    """Blocks of keys, and of values, in the rings."""
    registers: int
    """Of a consumer's threads."""


@gluon.jit
def _exp2(x):
    """2 ** x; denormal results are zero, which spares three instructions."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _piece(item, tiles_ptr, query_start_ptr, seq_lens_ptr, heads):
    """A piece of work: head, row, first query token, its row's start, query tokens and tokens."""
    tile = item // heads
    row = gl.load(tiles_ptr + 2 * tile)
    first = gl.load(tiles_ptr + 2 * tile + 1)
    used = gl.maximum(row, 0)
    start = gl.load(query_start_ptr + used)
    queries = gl.load(query_start_ptr + used + 1) - start
    return item % heads, row, first, start, queries, gl.load(seq_lens_ptr + used)


@gluon.jit
def _item(turn, programs):
    """The piece that a program takes at a turn: there and back again, as the pieces become smaller."""
    me = gl.program_id(0)
    if turn % 2 == 1:
        me = programs - 1 - me
    return turn * programs + me


@gluon.jit
def _load_block(
    qkv_desc, cache_desc, target, bar, table, block, qkv_row, qkv_column, cache_column, tokens, in_step,
    BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """A block of keys, or values, to `target` [BLOCK, HEAD_DIM]."""
    BLOCK: gl.constexpr = target.shape[0]
    if in_step:
        PART: gl.constexpr = qkv_desc.block_type.shape[0]
        for i in gl.static_range(0, BLOCK, PART):
            tma.async_copy_global_to_shared(
                qkv_desc, [qkv_row + i, qkv_column], bar, target.slice(i, PART)
            )
    else:
        PIECE: gl.constexpr = cache_desc.block_type.shape[0]
        for i in gl.static_range(0, BLOCK, PIECE):
            key = block * BLOCK + i
            slot = gl.load(table + key // BLOCK_SIZE, mask=key < tokens, other=0) * BLOCK_SIZE + key % BLOCK_SIZE
            tma.async_copy_global_to_shared(cache_desc, [slot, cache_column], bar, target.slice(i, PIECE))


@gluon.jit
def _produce(
    qkv_desc, k_desc, v_desc, rings, rows, table_rows_ptr, block_tables_ptr, table_stride, items, heads, kv_heads,
    BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """Fill the rings: for each piece its queries, then its blocks of keys and values, the last ones first."""
    q, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    tiles_ptr, query_start_ptr, seq_lens_ptr = rows
    CONSUMERS: gl.constexpr = q.shape[0]
    programs = gl.num_programs(0)
    STAGES: gl.constexpr = k.shape[0]
    BLOCK: gl.constexpr = k.shape[1]
    HEAD_DIM: gl.constexpr = k.shape[2]
    Q_BYTES: gl.constexpr = q.shape[0] * q.shape[1] * q.shape[2] * 2
    BLOCK_BYTES: gl.constexpr = BLOCK * HEAD_DIM * 2
    ROWS: gl.constexpr = 64
    filled = 0
    pieces = 0
    for turn in range((items + programs - 1) // programs):
        item = _item(turn, programs)
        if item < items:
            head, row, first, start, queries, tokens = _piece(
                item, tiles_ptr, query_start_ptr, seq_lens_ptr, heads
            )
            if row >= 0:
                context = tokens - queries
                table = block_tables_ptr + gl.load(table_rows_ptr + row).to(gl.int64) * table_stride
                kv_head = head // (heads // kv_heads)
                end = gl.minimum(context + first + CONSUMERS * ROWS, tokens)
                blocks = (end + BLOCK - 1) // BLOCK
                mbarrier.wait(q_empty, (pieces & 1) ^ 1)
                mbarrier.expect(q_full, Q_BYTES)
                for i in gl.static_range(CONSUMERS):
                    tma.async_copy_global_to_shared(
                        qkv_desc, [start + first + i * ROWS, head * HEAD_DIM], q_full, q.index(i)
                    )
                pieces += 1
                for number in range(blocks):
                    block = blocks - 1 - number
                    stage = filled % STAGES
                    phase = (filled // STAGES) & 1
                    in_step = block * BLOCK >= context
                    qkv_row = start + block * BLOCK - context
                    mbarrier.wait(k_empty.index(stage), phase ^ 1)
                    mbarrier.expect(k_full.index(stage), BLOCK_BYTES)
                    _load_block(
                        qkv_desc, k_desc, k.index(stage), k_full.index(stage), table, block, qkv_row,
                        (heads + kv_head) * HEAD_DIM, kv_head * HEAD_DIM, tokens, in_step,
                        BLOCK_SIZE,
                    )  # fmt: skip
                    mbarrier.wait(v_empty.index(stage), phase ^ 1)
                    mbarrier.expect(v_full.index(stage), BLOCK_BYTES)
                    _load_block(
                        qkv_desc, v_desc, v.index(stage), v_full.index(stage), table, block, qkv_row,
                        (heads + kv_heads + kv_head) * HEAD_DIM, kv_head * HEAD_DIM, tokens, in_step,
                        BLOCK_SIZE,
                    )  # fmt: skip
                    filled += 1


@gluon.jit
def _softmax(scores, highest, scale, first_key, position, MASKED: gl.constexpr):
    """Weights of a block's keys, float32, with the highest score so far and the factor for earlier sums."""
    LAYOUT: gl.constexpr = scores.type.layout
    BLOCK: gl.constexpr = scores.shape[1]
    if MASKED:
        key = first_key + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT))
        scores = gl.where(key[None, :] <= position[:, None], scores, -1e30)
    higher = gl.maximum(highest, gl.max(scores, 1))
    scaled = higher * scale
    return _exp2(scores * scale - scaled[:, None]), higher, _exp2(highest * scale - scaled)


@gluon.jit
def _partial_sums(weights):
    """Each thread's own sums: [64, 4]."""
    BLOCK: gl.constexpr = weights.shape[1]
    return gl.sum(gl.sum(gl.reshape(weights, [64, BLOCK // 8, 4, 2]), 3), 1)


@gluon.jit
def _wait_full(full, taken, pred=True):
    """Until the block that is the ring's `taken`-th is there."""
    STAGES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(taken % STAGES), (taken // STAGES) & 1, pred)


@gluon.jit
def _start_scores(q, k, taken):
    """Start the product of the queries with the block of keys."""
    BLOCK: gl.constexpr = k.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    zeros = gl.zeros([64, BLOCK], gl.float32, SCORES)
    keys = k.index(taken % k.shape[0]).permute((1, 0))
    return warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_sums(sums, weights, shrink, v, v_full, taken):
    """Start adding the block's values to what there is by now."""
    SUMS: gl.constexpr = sums.type.layout
    sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]
    weights = gl.convert_layout(weights.to(v.dtype), gl.DotOperandLayout(0, SUMS, 2))
    _wait_full(v_full, taken)
    return warpgroup_mma(weights, v.index(taken % v.shape[0]), sums, is_async=True), weights


@gluon.jit
def _block_step(
    sums, weights, shrink, highest, total, scale, position, taken, block,
    q, k, v, k_full, k_empty, v_full, v_empty, MASKED: gl.constexpr,
):  # fmt: skip
    """One block of keys, which is there, and the values of the one before, which `sums` still lacks."""
    STAGES: gl.constexpr = k.shape[0]
    BLOCK: gl.constexpr = k.shape[1]
    scores = _start_scores(q, k, taken)
    sums, operand = _start_sums(sums, weights, shrink, v, v_full, taken - 1)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(taken % STAGES))
    weights, highest, shrink = _softmax(scores, highest, scale, block * BLOCK, position, MASKED)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + _partial_sums(weights)
    # Before the wait for the sums: what stands before this loop cannot be moved behind that wait.
    _wait_full(k_full, taken + 1, block > 0)
    sums, operand = warpgroup_mma_wait(0, deps=(sums, operand))
    mbarrier.arrive(v_empty.index((taken - 1) % STAGES))
    return sums, weights, shrink, highest, total


@gluon.jit
def _pass(taken, count, k_full, k_empty, v_full, v_empty):
    """Leave so many blocks of the rings unread."""
    STAGES: gl.constexpr = k_full.shape[0]
    for _ in range(count):
        stage = taken % STAGES
        phase = (taken // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_empty.index(stage))
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage))
        taken += 1
    return taken


@gluon.jit
def _clear(values, count):
    """Zero the rows from `count` on: what other requests left there may not be finite, and 0 * nan is nan."""
    BLOCK: gl.constexpr = values.shape[0]
    HEAD_DIM: gl.constexpr = values.shape[1]
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    row = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, WIDE))
    kept = gl.where(row[:, None] < count, values.load(WIDE), 0.0)
    values.store(kept)
    fence_async_shared()


@gluon.jit
def _consume(
    rings, rows, out_ptr, scale, items, heads, ME: gl.constexpr
):  # fmt: skip
    """The part of one consumer of all pieces of the program."""
    q_tiles, k, v, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    tiles_ptr, query_start_ptr, seq_lens_ptr = rows
    CONSUMERS: gl.constexpr = q_tiles.shape[0]
    programs = gl.num_programs(0)
    STAGES: gl.constexpr = k.shape[0]
    BLOCK: gl.constexpr = k.shape[1]
    HEAD_DIM: gl.constexpr = k.shape[2]
    ROWS: gl.constexpr = 64
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, HEAD_DIM, 16]
    )
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    q = q_tiles.index(ME)
    taken = 0
    pieces = 0
    for turn in range((items + programs - 1) // programs):
        item = _item(turn, programs)
        if item < items:
            head, row, first, start, queries, tokens = _piece(
                item, tiles_ptr, query_start_ptr, seq_lens_ptr, heads
            )
            if row >= 0:
                context = tokens - queries
                end = gl.minimum(context + first + CONSUMERS * ROWS, tokens)
                blocks = (end + BLOCK - 1) // BLOCK
                mine = first + ME * ROWS
                used = (gl.minimum(context + mine + ROWS, tokens) + BLOCK - 1) // BLOCK
                if mine >= queries:
                    used = 0
                mbarrier.wait(q_full, pieces & 1)
                pieces += 1
                taken = _pass(taken, blocks - used, k_full, k_empty, v_full, v_empty)
                if used == 0:
                    mbarrier.arrive(q_empty)
                else:
                    offset = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
                    position = context + mine + offset
                    block = used - 1
                    if (block + 1) * BLOCK > tokens:
                        _wait_full(v_full, taken)
                        _clear(v.index(taken % STAGES), tokens - block * BLOCK)
                    _wait_full(k_full, taken)
                    scores = _start_scores(q, k, taken)
                    scores = warpgroup_mma_wait(0, deps=(scores,))
                    mbarrier.arrive(k_empty.index(taken % STAGES))
                    highest = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
                    weights, highest, shrink = _softmax(scores, highest, scale, block * BLOCK, position, True)
                    total = _partial_sums(weights)
                    sums = gl.zeros([ROWS, HEAD_DIM], gl.float32, SUMS)
                    taken += 1
                    _wait_full(k_full, taken, block > 0)
                    seen_by_all = (context + mine + 1) // BLOCK
                    for i in range(gl.maximum(block - seen_by_all, 0)):
                        block -= 1
                        sums, weights, shrink, highest, total = _block_step(
                            sums, weights, shrink, highest, total, scale, position, taken, block,
                            q, k, v, k_full, k_empty, v_full, v_empty, True,
                        )  # fmt: skip
                        taken += 1
                    for i in range(block):
                        sums, weights, shrink, highest, total = _block_step(
                            sums, weights, shrink, highest, total, scale, position, taken, block - 1 - i,
                            q, k, v, k_full, k_empty, v_full, v_empty, False,
                        )  # fmt: skip
                        taken += 1
                    mbarrier.arrive(q_empty)
                    sums, operand = _start_sums(sums, weights, shrink, v, v_full, taken - 1)
                    sums = warpgroup_mma_wait(0, deps=(sums,))
                    mbarrier.arrive(v_empty.index((taken - 1) % STAGES))
                    share = gl.convert_layout(1.0 / gl.sum(total, 1), gl.SliceLayout(1, SUMS))
                    result = gl.convert_layout((sums * share[:, None]).to(k.dtype), WIDE)
                    token = mine + gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
                    column = head * HEAD_DIM + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, WIDE))
                    place = (start + token).to(gl.int64) * (heads * HEAD_DIM)
                    gl.store(
                        out_ptr + place[:, None] + column[None, :], result, mask=(token < queries)[:, None]
                    )


@gluon.jit(do_not_specialize=["table_stride", "items", "heads", "kv_heads"])
def _prompt_attention_kernel(
    qkv_desc,  # [tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM]
    k_desc,  # [slots, KV_HEADS * HEAD_DIM]
    v_desc,
    out_ptr,  # [tokens, HEADS * HEAD_DIM]
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
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, HEAD_DIM], dtype)
    q = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, HEAD_DIM], qkv_desc.layout)
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
    rows = (tiles_ptr, query_start_ptr, seq_lens_ptr)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [(_consume, (rings, rows, out_ptr, scale, items, heads, 0)), (_consume, (rings, rows, out_ptr, scale, items, heads, 1)), (_produce, (qkv_desc, k_desc, v_desc, rings, rows, table_rows_ptr, block_tables_ptr, table_stride, items, heads, kv_heads, BLOCK_SIZE))],
            [4, 1],
            [REGISTERS, 24],
        )
    elif CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consume, (rings, rows, out_ptr, scale, items, heads, 0)),
                (_consume, (rings, rows, out_ptr, scale, items, heads, 1)),
                (_consume, (rings, rows, out_ptr, scale, items, heads, 2)),
                (_produce, (qkv_desc, k_desc, v_desc, rings, rows, table_rows_ptr, block_tables_ptr, table_stride, items, heads, kv_heads, BLOCK_SIZE)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (rings, rows, out_ptr, scale, items, heads, 0)),
                (_consume, (rings, rows, out_ptr, scale, items, heads, 1)),
                (_consume, (rings, rows, out_ptr, scale, items, heads, 2)),
                (_consume, (rings, rows, out_ptr, scale, items, heads, 3)),
                (_produce, (qkv_desc, k_desc, v_desc, rings, rows, table_rows_ptr, block_tables_ptr, table_stride, items, heads, kv_heads, BLOCK_SIZE)),
            ],
            [4, 4, 4, 1],
            [REGISTERS, REGISTERS, REGISTERS, 24],
        )


def tuning(head_dim: int) -> Tuning:
    """How to compute heads of so many components."""
    return Tuning(2, 128, 2, 240) if head_dim == 128 else Tuning(3, 64, 4, 160)


@cache
def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> object:
    return gl.NVMMASharedLayout.get_default_for(
        [rows, columns], gl.float16 if dtype == torch.float16 else gl.bfloat16
    )


def _descriptor(matrix: Tensor, rows: int, columns: int) -> object:
    layout = _shared_layout(rows, columns, matrix.dtype)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns], layout)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def prompt_attention(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    table_rows: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    tiles: Tensor,
    scale: float,
    out: Tensor,
    chosen: Tuning | None = None,
) -> Tensor:
    """Causal attention of the query tokens of `tiles` over their rows' sequences."""
    tokens, all_heads, head_dim = qkv.shape
    blocks, block_size, kv_heads, _ = k_cache.shape
    heads = all_heads - 2 * kv_heads
    used = chosen or tuning(head_dim)
    items = len(tiles) * heads
    piece = min(block_size, used.block)
    _prompt_attention_kernel[(min(_processors(qkv.device), items),)](
        _descriptor(qkv.view(tokens, -1), ROWS, head_dim),
        _descriptor(k_cache.view(blocks * block_size, -1), piece, head_dim),
        _descriptor(v_cache.view(blocks * block_size, -1), piece, head_dim),
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
        kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        CONSUMERS=used.consumers,
        BLOCK=used.block,
        STAGES=used.stages,
        REGISTERS=used.registers,
        num_warps=4,
    )
    return out
