"""Attention of many query tokens a row over a paged KV cache: prompts, chunks of prompts, and any mix.

One program computes a tile: some consecutive query tokens of one row, with all query heads that share a key
head, against all of the row's earlier tokens. Which tiles there are is the caller's list, so rows of any
lengths lie packed in one launch. Decoding rows work too, but without splitting long sequences over programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dot import dot
from .jit import tl, triton

TILE_ROWS = 128
"""(query token, head) pairs of a tile: what two warp groups multiply at once on Hopper."""


def tile_tokens(heads: int, kv_heads: int, head_bytes: int) -> int:
    """Query tokens of one tile. Heads of over 512 bytes (256 of float32) leave room for half a tile."""
    rows = TILE_ROWS // 2 if head_bytes > 512 else TILE_ROWS
    return max(1, rows // int(triton.next_power_of_2(heads // kv_heads)))


class PrefillTuning(NamedTuple):
    """How a program walks over the keys."""

    block: int
    """Keys at a time."""
    num_warps: int
    num_stages: int


def _tuning(head_dim: int, element_size: int) -> PrefillTuning:
    if element_size == 4:  # what fits into shared memory
        return PrefillTuning(32, 8, 1 if head_dim >= 256 else 2)
    # Measured on an H200 with 4 prompts of 4096 tokens: 334 TFLOP/s with heads of 64, 383 with heads of 128.
    return PrefillTuning(64, 4 if head_dim == 128 else 8, 2 if head_dim >= 256 else 3)


def paged_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    table_rows: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    tiles: Tensor,
    scale: float,
    out: Tensor | None = None,
    tuning: PrefillTuning | None = None,
) -> Tensor:
    """Causal attention of the query tokens of `tiles` over their rows' sequences.

    Args:
        q: [tokens, heads, head_dim], dense in the last two dimensions.
        k_cache, v_cache: [blocks, block_size, kv_heads, head_dim]
        block_tables: int32 [tables, max_blocks]
        table_rows: int32 [rows], each row's entry in `block_tables`.
        query_start: int32 [rows + 1], each row's first token in `q`.
        seq_lens: int32 [rows], a row's tokens, of which its query tokens are the last.
        tiles: int32 [count, 2]: a row, and the tile's first query token in it, a multiple of
            `tile_tokens(heads, kv_heads, bytes of a head)`. A row of -1 is no tile.
        out: where to put the result, dense.

    Returns: [tokens, heads * head_dim]; tokens in no tile are undefined.
    """
    tokens, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    if out is None:
        out = torch.empty(tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    padded = triton.next_power_of_2(head_dim)
    chosen = tuning or _tuning(padded, q.element_size())
    _paged_prefill_kernel[len(tiles), kv_heads](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        table_rows,
        query_start,
        seq_lens,
        tiles,
        scale * 1.4426950408889634,
        q.stride(0),
        block_tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        PADDED_GROUP=triton.next_power_of_2(group),
        HEAD_DIM=head_dim,
        PADDED_DIM=padded,
        BLOCK_SIZE=block_size,
        TOKENS=tile_tokens(heads, kv_heads, head_dim * q.element_size()),
        BLOCK_N=chosen.block,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
    return out


@triton.jit
def _attend(
    q,
    highest,
    total,
    result,
    begin,
    end,
    position,
    kv_head,
    k_cache_ptr,
    v_cache_ptr,
    table_ptr,
    scale,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys and values more. Without MASKED all queries see all of it."""
    column = tl.arange(0, PADDED_DIM)
    key = begin + tl.arange(0, BLOCK_N)
    if MASKED:
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
        mask = (key < end)[:, None] & (column < HEAD_DIM)[None, :]
    else:
        block = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
        mask = tl.broadcast_to((column < HEAD_DIM)[None, :], BLOCK_N, PADDED_DIM)
    place = ((block * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
    if HEAD_DIM == PADDED_DIM and not MASKED:
        k = tl.load(k_cache_ptr + place[:, None] + column[None, :])
        v = tl.load(v_cache_ptr + place[:, None] + column[None, :])
    else:
        k = tl.load(k_cache_ptr + place[:, None] + column[None, :], mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + place[:, None] + column[None, :], mask=mask, other=0.0)
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32), "tf32x3") * scale
    if MASKED:
        scores = tl.where(key[None, :] <= position[:, None], scores, -1e30)
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(highest - higher)
    total = total * shrink + tl.sum(weights, 1)
    result = dot(weights.to(v.dtype), v, result * shrink[:, None], "tf32x3")
    return higher, total, result


@triton.jit  # type: ignore[untyped-decorator]
def _paged_prefill_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    block_tables_ptr,
    table_rows_ptr,
    query_start_ptr,
    seq_lens_ptr,
    tiles_ptr,
    scale,  # times log2(e): the softmax is computed with exp2
    q_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    row = tl.load(tiles_ptr + 2 * tl.program_id(0))
    if row < 0:
        return
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    start = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - start
    seq_len = tl.load(seq_lens_ptr + row)
    table_ptr = block_tables_ptr + tl.load(table_rows_ptr + row).to(tl.int64) * table_stride

    pair = tl.arange(0, TOKENS * PADDED_GROUP)
    token = first + pair // PADDED_GROUP
    member = pair % PADDED_GROUP
    column = tl.arange(0, PADDED_DIM)
    inside = (token < query_len) & (member < GROUP)
    head = kv_head * GROUP + member
    q_place = (start + token).to(tl.int64) * q_stride + head * HEAD_DIM
    q = tl.load(
        q_ptr + q_place[:, None] + column[None, :],
        mask=inside[:, None] & (column < HEAD_DIM)[None, :],
        other=0.0,
    )
    position = seq_len - query_len + token

    highest = tl.full([TOKENS * PADDED_GROUP], -1e30, tl.float32)
    total = tl.zeros([TOKENS * PADDED_GROUP], tl.float32)
    result = tl.zeros([TOKENS * PADDED_GROUP, PADDED_DIM], tl.float32)
    context = seq_len - query_len + first  # tokens that all of the tile's queries see
    end = tl.minimum(seq_len, context + TOKENS)
    seen_by_all = context // BLOCK_N * BLOCK_N
    for begin in range(0, seen_by_all, BLOCK_N):
        highest, total, result = _attend(
            q, highest, total, result, begin, end, position, kv_head, k_cache_ptr, v_cache_ptr, table_ptr,
            scale, KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, BLOCK_N, False,
        )  # fmt: skip
    for begin in range(seen_by_all, end, BLOCK_N):
        highest, total, result = _attend(
            q, highest, total, result, begin, end, position, kv_head, k_cache_ptr, v_cache_ptr, table_ptr,
            scale, KV_HEADS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, BLOCK_N, True,
        )  # fmt: skip
    out_place = ((start + token).to(tl.int64) * (KV_HEADS * GROUP) + head) * HEAD_DIM
    tl.store(
        out_ptr + out_place[:, None] + column[None, :],
        (result / total[:, None]).to(q.dtype),
        mask=inside[:, None] & (column < HEAD_DIM)[None, :],
    )
