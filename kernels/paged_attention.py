"""Attention over a paged KV cache, for any mix of decodes and prefill chunks.

The tokens of a step lie flat, row after row. A row is one sequence's share of the step: its query tokens are
the last of its `seq_len` tokens, and its keys and values, the new ones included, are already in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .invariant_attention import InvariantTile, invariant_attention, plan_invariant
from .paged_prefill import paged_prefill

_WORTH_A_GROUP = 256
"""Padding of so many tokens costs about as much as one more call."""


@dataclass(frozen=True)
class AttentionMetadata:
    """What attention needs to know about a step; the same for all layers.

    Entries of `block_tables` beyond a row's blocks may be any valid block number. The cache must hold finite
    numbers everywhere, also where nothing was written.
    """

    slot_mapping: Tensor
    """int64 [tokens], where each token's keys and values go: block * block_size + offset."""
    block_tables: Tensor
    """int32 [rows, max_blocks]"""
    query_start: Tensor
    """int32 [rows + 1], each row's first token; the last entry is the number of tokens."""
    seq_lens: Tensor
    """int32 [rows], tokens of each sequence after this step."""
    num_decodes: int
    """The first `num_decodes` rows have one query token each."""
    max_seq_len: int
    """At least the largest of `seq_lens`."""
    query_lens_host: Sequence[int] = ()
    """The rows' numbers of query tokens."""
    seq_lens_host: Sequence[int] = ()
    """`seq_lens` again, for the torch path."""
    table_rows: Tensor | None = None
    """int32 [rows], each row's entry in `block_tables`; None: they are in order. For the Triton path."""
    tiles: Tensor | None = None
    """int32 [tiles, 2], as `paged_prefill` takes them. For the Triton path."""
    invariant: int = 0
    """Not 0: a token's result must not depend on what is computed beside it; query rows are filled up to a
    multiple of this. For the torch path."""

    _plans: dict[int, _Plan] = field(default_factory=dict, repr=False, compare=False)
    """Block size -> the torch path's plan; made by the first layer of a step, used by all."""
    _invariant_plans: dict[int, list[InvariantTile]] = field(default_factory=dict, repr=False, compare=False)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float
) -> Tensor:
    """Causal attention of every query token over its own sequence.

    Args:
        q: [tokens, heads, head_dim]
        k_cache, v_cache: [blocks, block_size, kv_heads, head_dim]; heads is a multiple of kv_heads.
        scale: factor of the scores, before the softmax.

    Returns: [tokens, heads * head_dim].
    """
    if meta.tiles is not None and meta.table_rows is not None:
        return paged_prefill(
            q,
            k_cache,
            v_cache,
            block_tables=meta.block_tables,
            table_rows=meta.table_rows,
            query_start=meta.query_start,
            seq_lens=meta.seq_lens,
            tiles=meta.tiles,
            scale=scale,
        )
    if meta.invariant:
        plan = _invariant_plan(meta, k_cache.shape[1], q.shape[1] // k_cache.shape[2])
        return invariant_attention(q, k_cache, v_cache, plan, scale)
    return paged_attention_reference(q, k_cache, v_cache, meta, scale)


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, meta: AttentionMetadata, scale: float
) -> Tensor:
    """The same in torch. Works from the host copies in `meta`."""
    block_size = k_cache.shape[1]
    plan = meta._plans.get(block_size)
    if plan is None:
        plan = meta._plans[block_size] = _make_plan(meta, block_size)
    tokens, heads, head_dim = q.shape
    if plan.is_one_group:
        return _decode(q, k_cache, v_cache, plan.decodes[0], scale).reshape(tokens, heads * head_dim)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for group in plan.decodes:
        attended = _decode(q.index_select(0, group.rows), k_cache, v_cache, group, scale)
        out.index_copy_(0, group.rows, attended.reshape(-1, heads, head_dim))
    for row in plan.prefills:
        out[row.tokens] = _prefill(q[row.tokens], k_cache, v_cache, row, scale)
    return out.view(tokens, heads * head_dim)


class _Decodes(NamedTuple):
    """Rows of one query token and of similar length, padded to the longest."""

    rows: Tensor
    """int64 [n]"""
    blocks: Tensor
    """int32 [n * max_blocks], their block tables."""
    bias: Tensor
    """float32 [n, 1, 1, max_blocks * block_size]: 0 for a token of the sequence, -inf for padding."""


class _Prefill(NamedTuple):
    """A row of several query tokens."""

    tokens: slice
    """Its place in the step."""
    blocks: Tensor
    """int32 [n], its block table."""
    seq_len: int
    mask: Tensor | None
    """bool [query_len, seq_len]; None when there is no earlier context and plain causality applies."""


class _Plan(NamedTuple):
    decodes: list[_Decodes]
    prefills: list[_Prefill]
    is_one_group: bool
    """The step is one group of decodes, in order."""


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: _Decodes, scale: float) -> Tensor:
    """[n, heads, head_dim] to [n, kv_heads, heads / kv_heads, head_dim]. The query heads that share a key
    head become that head's query tokens, so nothing is repeated.
    """
    rows, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    keys = k_cache.index_select(0, group.blocks).view(rows, -1, kv_heads, head_dim).transpose(1, 2)
    values = v_cache.index_select(0, group.blocks).view(rows, -1, kv_heads, head_dim).transpose(1, 2)
    queries = q.view(rows, kv_heads, heads // kv_heads, head_dim)
    # CPUs take a float32 bias with any type; on a GPU the types must agree.
    bias = group.bias.to(q.dtype) if q.is_cuda else group.bias
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)


def _prefill(q: Tensor, k_cache: Tensor, v_cache: Tensor, row: _Prefill, scale: float) -> Tensor:
    """[query_len, heads, head_dim], both sides."""
    head_shape = k_cache.shape[2:]
    keys = k_cache.index_select(0, row.blocks).view(-1, *head_shape)[: row.seq_len]
    values = v_cache.index_select(0, row.blocks).view(-1, *head_shape)[: row.seq_len]
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=row.mask,
        is_causal=row.mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != head_shape[0],
    )
    return attended[0].transpose(0, 1)


def _make_plan(meta: AttentionMetadata, block_size: int) -> _Plan:
    decodes = [_decode_group(meta, rows, block_size) for rows in _similar_rows(meta)]
    prefills, start = [], meta.num_decodes
    for row in range(meta.num_decodes, len(meta.seq_lens_host)):
        query_len, seq_len = meta.query_lens_host[row], meta.seq_lens_host[row]
        blocks = meta.block_tables[row, : -(-seq_len // block_size)]
        mask = _causal_mask(query_len, seq_len, blocks.device) if query_len < seq_len else None
        prefills.append(_Prefill(slice(start, start + query_len), blocks, seq_len, mask))
        start += query_len
    return _Plan(decodes, prefills, is_one_group=len(decodes) == 1 and not prefills)


def _invariant_plan(meta: AttentionMetadata, block_size: int, group: int) -> list[InvariantTile]:
    plan = meta._invariant_plans.get(block_size)
    if plan is None:
        tables, lens = meta.block_tables, meta.seq_lens_host
        plan = plan_invariant(
            tables, meta.query_lens_host, lens, meta.num_decodes, block_size, group, meta.invariant
        )
        meta._invariant_plans[block_size] = plan
    return plan


def _similar_rows(meta: AttentionMetadata) -> list[list[int]]:
    """The decode rows in groups, so that one long sequence does not pad all others to its length."""
    lens = meta.seq_lens_host
    groups: list[list[int]] = []
    for row in sorted(range(meta.num_decodes), key=lambda row: -lens[row]):
        if not groups or 2 * lens[row] + _WORTH_A_GROUP < lens[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def _decode_group(meta: AttentionMetadata, rows: list[int], block_size: int) -> _Decodes:
    max_blocks = -(-max(meta.seq_lens_host[row] for row in rows) // block_size)
    device = meta.block_tables.device
    index = torch.tensor(rows, device=device)
    blocks = meta.block_tables[index, :max_blocks]
    padding = torch.arange(max_blocks * block_size, device=device) >= meta.seq_lens[index, None]
    bias = torch.zeros(padding.shape, device=device).masked_fill_(padding, -torch.inf)
    return _Decodes(index, blocks.flatten(), bias[:, None, None])


def _causal_mask(query_len: int, seq_len: int, device: torch.device) -> Tensor:
    return torch.ones(query_len, seq_len, dtype=torch.bool, device=device).tril_(seq_len - query_len)
