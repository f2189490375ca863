"""Attention on CPUs whose result for a token is the same bits whatever else is computed beside it.

Torch's fused attention takes keys 512 at a time and query rows in groups, and sums in an order that depends
on how many there are. So a sequence is always padded to whole stretches of 512 keys, and query rows to a
multiple of 4: then each row goes the same way through the same multiplications, in a chunk of a prompt or
alone. Fully masked keys add exact zeros. `worker/invariance.py` checks that this holds for the CPU at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KEYS = 512
"""As many as torch's kernel takes at a time."""
ROWS = 4
"""Copies or dummies fill up the query tokens of a call to a multiple of this."""
_TILE = 128
"""Query tokens of one call, so that little is computed which causality then takes away."""


class InvariantTile(NamedTuple):
    """Query tokens of one sequence, or single ones of several that have equally many stretches of keys."""

    tokens: Tensor
    """int64 [sequences, queries], their places in the step; the last may repeat to fill up"""
    blocks: Tensor
    """int64 [sequences, blocks of all keys], flat"""
    bias: Tensor
    """float32 [sequences, 1, queries, keys]: 0 for keys up to the query's own, -inf beyond"""
    num_queries: int
    """Without those that fill up."""


def plan_invariant(
    block_tables: Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_decodes: int,
    block_size: int,
) -> list[InvariantTile]:
    """The calls that one step needs, the same for all layers. `block_size` divides 512."""
    by_stretches: dict[int, list[int]] = {}
    for row in range(num_decodes):
        by_stretches.setdefault(-(-seq_lens[row] // KEYS), []).append(row)
    tiles = [
        _tile(block_tables, rows, [[row] * ROWS for row in rows], [[seq_lens[row]] * ROWS for row in rows], 1)
        for rows in by_stretches.values()
    ]
    first = num_decodes
    for row in range(num_decodes, len(seq_lens)):
        count, before = query_lens[row], seq_lens[row] - query_lens[row]
        for begin in range(0, count, _TILE):
            queries = list(range(begin, min(begin + _TILE, count)))
            padded = queries + [queries[-1]] * (-len(queries) % ROWS)
            places, lengths = [first + i for i in padded], [before + i + 1 for i in padded]
            tiles.append(_tile(block_tables, [row], [places], [lengths], len(queries)))
        first += count
    return [_of_size(tile, block_size) for tile in tiles]


def _tile(
    tables: Tensor, rows: list[int], places: list[list[int]], lengths: list[list[int]], num_queries: int
) -> InvariantTile:
    keys = -(-max(map(max, lengths)) // KEYS) * KEYS
    beyond = torch.arange(keys) >= torch.tensor(lengths)[:, :, None]
    bias = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)
    return InvariantTile(torch.tensor(places), tables[torch.tensor(rows)].long(), bias[:, None], num_queries)


def _of_size(tile: InvariantTile, block_size: int) -> InvariantTile:
    """With as many blocks as its keys take; those that a sequence has not are its first, masked."""
    wanted = tile.bias.shape[-1] // block_size
    blocks = tile.blocks[:, :wanted]
    missing = wanted - blocks.shape[1]
    if missing:
        blocks = torch.cat((blocks, blocks[:, :1].expand(-1, missing)), dim=1)
    return tile._replace(blocks=blocks.reshape(-1))


def invariant_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, tiles: Sequence[InvariantTile], scale: float
) -> Tensor:
    """Causal attention of every query token over its own sequence.

    Args:
        q: [tokens, heads, head_dim]
        k_cache, v_cache: [blocks, block_size, kv_heads, head_dim]; heads is a multiple of kv_heads.

    Returns: [tokens, heads * head_dim].
    """
    tokens, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    group = heads // kv_heads
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype)
    for tile in tiles:
        count, queries = tile.tokens.shape
        keys, values = (
            cache.index_select(0, tile.blocks).view(count, -1, kv_heads, head_dim).transpose(1, 2)
            for cache in (k_cache, v_cache)
        )
        # The query heads that share a key head become that head's queries.
        mine = q[tile.tokens].view(count, queries, kv_heads, group, head_dim).transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            mine.reshape(count, kv_heads, queries * group, head_dim),
            keys,
            values,
            attn_mask=tile.bias.repeat_interleave(group, dim=2),
            scale=scale,
        )
        back = attended.view(count, kv_heads, queries, group, head_dim).transpose(1, 2)
        used = tile.num_queries
        out[tile.tokens[:, :used].reshape(-1)] = back[:, :used].reshape(-1, heads, head_dim)
    return out.view(tokens, heads * head_dim)
