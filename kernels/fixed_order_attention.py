"""Attention over a paged KV cache whose result for a token is the same bits, however the step is composed.

The keys of a sequence are cut at multiples of `CHUNK`, whoever asks. A chunk's softmax is computed tile after
tile, and the chunks' results are put together in their order. A token that decodes and the same token in the
middle of a prompt so go through the same operations; what it must not see adds exact zeros.

One program computes a tile of query tokens of one row with all heads that share a key head, as in
`paged_prefill`. The chunks of decoding rows go through memory, spread over programs where rows are few; the
program that finishes last puts them together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dot import dot
from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous

CHUNK = 256
"""Keys."""
_TILE_ROWS = 64
"""(query token, head) pairs of a tile of prompt tokens: one warp group's, 16 for each warp."""
_DECODE_ROWS = 16
"""Of a tile of one token: one warp's. A warp computes its rows like every other one."""
_SPREAD = 1056
"""Programs to spread the chunks of decoding rows over: eight for each of an H200's multiprocessors."""
_ROOM = 1 << 27
"""Bytes for chunks of decoding rows at most, unless one row needs more."""


def tile_tokens(heads: int, kv_heads: int) -> int:
    """Query tokens of one tile, more than one."""
    return max(2, _TILE_ROWS // int(triton.next_power_of_2(heads // kv_heads)))


def _tile(head_dim: int) -> int:
    """Keys at a time, for everybody: more of wide heads do not fit into a warp's registers."""
    return 64 if head_dim <= 64 else 32


class Workspace(NamedTuple):
    """Memory for chunks that are spread over programs. One launch at a time uses it."""

    partial: Tensor
    """float32 [rows, chunks, heads, head_dim], weighted values of a chunk"""
    stats: Tensor
    """float32 [rows, chunks, heads, 2], largest score and sum of a chunk, to base 2"""
    arrivals: Tensor
    """int32 [rows, kv_heads], finished chunks; zero between launches"""

    @classmethod
    def empty(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        max_rows: int,
        max_tokens: int,
        device: torch.device,
    ) -> Workspace:
        """For up to `max_rows` decoding rows of up to `max_tokens`, or for as many as there is room."""
        chunks = triton.cdiv(max_tokens, CHUNK)
        rows = max(1, min(max_rows, _ROOM // (chunks * heads * head_dim * 4)))
        return cls(
            torch.empty(rows, chunks, heads, head_dim, dtype=torch.float32, device=device),
            torch.empty(rows, chunks, heads, 2, dtype=torch.float32, device=device),
            torch.zeros(rows, kv_heads, dtype=torch.int32, device=device),
        )


def fixed_order_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_tables: Tensor,
    table_rows: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    tiles: Tensor,
    tile_tokens: int,
    scale: float,
    workspace: Workspace,
    out: Tensor | None = None,
) -> Tensor:
    """Causal attention of the query tokens of `tiles` over their rows' sequences.

    Arguments as for `paged_prefill`, but for
        tile_tokens: most query tokens of a tile; 1 for tiles of decoding rows, of which tile i is row i.
    """
    tokens, heads, head_dim = q.shape
    _, block_size, kv_heads, _ = k_cache.shape
    group = heads // kv_heads
    padded_group = triton.next_power_of_2(group)
    if out is None:
        out = torch.empty(tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    spread = tile_tokens == 1 and len(tiles) <= len(workspace.partial)
    splits = min(workspace.partial.shape[1], triton.cdiv(_SPREAD, len(tiles) * kv_heads)) if spread else 1
    if tile_tokens == 1:  # two warps would share the rows in another way
        padded_group = max(padded_group, _DECODE_ROWS if padded_group <= _DECODE_ROWS else _TILE_ROWS)
    _fixed_order_kernel[len(tiles), kv_heads, splits](
        q,
        k_cache,
        v_cache,
        out,
        block_tables,
        table_rows,
        query_start,
        seq_lens,
        tiles,
        workspace.partial,
        workspace.stats,
        workspace.arrivals,
        scale * 1.4426950408889634,
        q.stride(0),
        block_tables.stride(0),
        workspace.partial.shape[1],
        KV_HEADS=kv_heads,
        GROUP=group,
        PADDED_GROUP=padded_group,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        TOKENS=tile_tokens,
        SPREAD=spread,
        TILE=_tile(head_dim),
        CHUNK=CHUNK,
        num_warps=max(1, tile_tokens * padded_group // 16),
        num_stages=_stages(head_dim, q.dtype),
        **pdl_options(q),
    )
    return out


def _stages(head_dim: int, dtype: torch.dtype) -> int:
    """As many as there is shared memory for."""
    if dtype == torch.float32:
        return 1
    return 3 if head_dim <= 128 else 2


@triton.jit
def _attend(
    q,
    highest,
    total,
    values,
    begin,
    end,
    position,
    k_ptr,
    v_ptr,
    table_ptr,
    scale,
    STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ALL_SEEN: tl.constexpr,
):
    """The softmax (largest score, sum, weighted values) after one more tile of keys.

    Multiplications and additions are fused by hand: the compiler may fuse one way here and another there.
    """
    column = tl.arange(0, WIDTH)
    key = begin + tl.arange(0, TILE)
    if ALL_SEEN:
        block = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
    else:
        block = tl.load(table_ptr + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
    place = (block * BLOCK_SIZE + key % BLOCK_SIZE)[:, None] * STRIDE + column[None, :]
    if ALL_SEEN and HEAD_DIM == WIDTH:
        k = tl.load(k_ptr + place)
        v = tl.load(v_ptr + place)
    else:
        mask = (key < end)[:, None] & (column < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + place, mask=mask, other=0.0)
        v = tl.load(v_ptr + place, mask=mask, other=0.0)
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], TILE], tl.float32), "ieee")
    if not ALL_SEEN:
        seen = key[None, :] <= position[:, None]
        scores = tl.where(seen, scores, -1e30)
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, tl.broadcast_to(-higher[:, None], scores.shape)))
    if not ALL_SEEN:
        weights = tl.where(seen, weights, 0.0)
    kept = tl.exp2(highest - higher)
    total = tl.fma(total, kept, tl.sum(weights, 1))
    values = dot(weights.to(v.dtype), v, values * kept[:, None], "ieee")
    return higher, total, values


@triton.jit
def _merge(highest, total, values, more_highest, more_total, more_values):
    """Put the next chunk's softmax to that of all before."""
    higher = tl.maximum(highest, more_highest)
    kept = tl.exp2(highest - higher)
    weight = tl.exp2(more_highest - higher)
    total = tl.fma(more_total, weight, total * kept)
    wide = tl.broadcast_to(weight[:, None], values.shape)
    return higher, total, tl.fma(more_values, wide, values * kept[:, None])


@triton.jit
def _walk(
    q, highest, total, values, chunk_highest, chunk_total, chunk_values, begin, stop,
    end, position, k_ptr, v_ptr, table_ptr, scale,
    STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """Attend to the keys from `begin` to `stop`; merge every chunk that is complete with the rest."""
    for at in range(begin, stop, TILE):
        chunk_highest, chunk_total, chunk_values = _attend(
            q, chunk_highest, chunk_total, chunk_values, at, end, position, k_ptr, v_ptr, table_ptr,
            scale, STRIDE, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, ALL_SEEN,
        )  # fmt: skip
        if (at + TILE) % CHUNK == 0:
            highest, total, values = _merge(highest, total, values, chunk_highest, chunk_total, chunk_values)
            chunk_highest = tl.full(chunk_highest.shape, -1e30, tl.float32)
            chunk_total = tl.zeros(chunk_total.shape, tl.float32)
            chunk_values = tl.zeros(chunk_values.shape, tl.float32)
    return highest, total, values, chunk_highest, chunk_total, chunk_values


@triton.jit(do_not_specialize=["table_stride", "max_chunks"])
def _fixed_order_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    block_tables_ptr,
    table_rows_ptr,
    query_start_ptr,
    seq_lens_ptr,
    tiles_ptr,
    partial_ptr,
    stats_ptr,
    arrivals_ptr,
    scale,  # times log2(e): the softmax is computed with exp2
    q_stride,
    table_stride,
    max_chunks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SPREAD: tl.constexpr,  # the chunks over the programs of the third axis; for tiles of one token
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    ROWS: tl.constexpr = TOKENS * PADDED_GROUP
    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    HEADS: tl.constexpr = KV_HEADS * GROUP
    allow_next(PDL)
    wait_previous(PDL)
    row = tl.load(tiles_ptr + 2 * tl.program_id(0))
    if row < 0:
        return
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    start = tl.load(query_start_ptr + row)
    query_len = tl.load(query_start_ptr + row + 1) - start
    seq_len = tl.load(seq_lens_ptr + row)
    context = seq_len - query_len + first  # tokens that all of the tile's queries see
    end = tl.minimum(seq_len, context + TOKENS)
    if SPREAD:  # noqa: SIM102 (known when compiled)
        if tl.program_id(2) * CHUNK >= end:
            return
    table_ptr = block_tables_ptr + tl.load(table_rows_ptr + row).to(tl.int64) * table_stride

    pair = tl.arange(0, ROWS)
    token = first + pair // PADDED_GROUP
    member = pair % PADDED_GROUP
    column = tl.arange(0, WIDTH)
    inside = (token < query_len) & (member < GROUP)
    head = kv_head * GROUP + member
    q_place = (start + token).to(tl.int64) * q_stride + head * HEAD_DIM
    whole = inside[:, None] & (column < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_place[:, None] + column[None, :], mask=whole, other=0.0)
    position = seq_len - query_len + token
    k_ptr = k_cache_ptr + kv_head * HEAD_DIM
    v_ptr = v_cache_ptr + kv_head * HEAD_DIM

    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, WIDTH], tl.float32)
    chunk_highest = tl.full([ROWS], -1e30, tl.float32)
    chunk_total = tl.zeros([ROWS], tl.float32)
    chunk_values = tl.zeros([ROWS, WIDTH], tl.float32)
    if SPREAD:
        chunks = tl.cdiv(end, CHUNK)
        stats = stats_ptr + (row * max_chunks * HEADS + head) * 2
        partial = partial_ptr + ((row * max_chunks * HEADS + head) * HEAD_DIM)[:, None] + column[None, :]
        for begin in range(tl.program_id(2) * CHUNK, end, tl.num_programs(2) * CHUNK):
            chunk_highest = tl.full([ROWS], -1e30, tl.float32)
            chunk_total = tl.zeros([ROWS], tl.float32)
            chunk_values = tl.zeros([ROWS, WIDTH], tl.float32)
            stop = tl.minimum(end, begin + CHUNK)
            for at in range(begin, stop, TILE):
                chunk_highest, chunk_total, chunk_values = _attend(
                    q, chunk_highest, chunk_total, chunk_values, at, stop, position, k_ptr, v_ptr, table_ptr,
                    scale, STRIDE, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, False,
                )  # fmt: skip
            if chunks > 1:
                at = begin // CHUNK * HEADS
                tl.store(stats + 2 * at, chunk_highest, mask=inside)
                tl.store(stats + 2 * at + 1, chunk_total, mask=inside)
                tl.store(partial + at * HEAD_DIM, chunk_values, mask=whole)
        if chunks > 1:
            tl.debug_barrier()
            arrivals = arrivals_ptr + row * KV_HEADS + kv_head
            others = tl.minimum(chunks, tl.num_programs(2)) - 1
            if tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") < others:
                return
            tl.store(arrivals, 0)
            for chunk in range(0, chunks - 1):
                at = chunk * HEADS
                highest, total, values = _merge(
                    highest,
                    total,
                    values,
                    tl.load(stats + 2 * at, mask=inside, other=0.0, cache_modifier=".cg"),
                    tl.load(stats + 2 * at + 1, mask=inside, other=1.0, cache_modifier=".cg"),
                    tl.load(partial + at * HEAD_DIM, mask=whole, other=0.0, cache_modifier=".cg"),
                )
            at = (chunks - 1) * HEADS
            chunk_highest = tl.load(stats + 2 * at, mask=inside, other=0.0, cache_modifier=".cg")
            chunk_total = tl.load(stats + 2 * at + 1, mask=inside, other=1.0, cache_modifier=".cg")
            chunk_values = tl.load(partial + at * HEAD_DIM, mask=whole, other=0.0, cache_modifier=".cg")
    else:
        seen_by_all = context // TILE * TILE
        highest, total, values, chunk_highest, chunk_total, chunk_values = _walk(
            q, highest, total, values, chunk_highest, chunk_total, chunk_values, 0, seen_by_all,
            end, position, k_ptr, v_ptr, table_ptr, scale,
            STRIDE, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, CHUNK, True,
        )  # fmt: skip
        highest, total, values, chunk_highest, chunk_total, chunk_values = _walk(
            q, highest, total, values, chunk_highest, chunk_total, chunk_values, seen_by_all, end,
            end, position, k_ptr, v_ptr, table_ptr, scale,
            STRIDE, HEAD_DIM, WIDTH, BLOCK_SIZE, TILE, CHUNK, False,
        )  # fmt: skip
    _, total, values = _merge(highest, total, values, chunk_highest, chunk_total, chunk_values)
    out_place = ((start + token).to(tl.int64) * HEADS + head) * HEAD_DIM
    tl.store(
        out_ptr + out_place[:, None] + column[None, :],
        (values / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=whole,
    )
