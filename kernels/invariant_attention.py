"""Attention on CPUs whose result for a token is the same bits whatever else is computed beside it.

Torch's fused attention sums in an order that depends on how many keys and query rows it is given. So the keys
of a token are always padded to a number that its position alone decides, and query rows to a multiple: then
each row goes the same way through the same multiplications, in a chunk of a prompt or alone. Masked keys add
exact zeros. `worker/invariance.py` finds the multiple for the CPU at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORT = (64, 128, 192, 256)
LONG = 512
"""Sequences longer than this are padded to a multiple of it: torch's kernel takes so many keys at a time."""
_TILE = 128
"""Query tokens of one call at most, so that little is computed which causality then takes away."""


class InvariantTile(NamedTuple):
    """Query tokens of one sequence, or single ones of several, all with equally many padded keys."""

    tokens: Tensor
    """int64 [sequences, queries], their places in the step; the last is repeated to fill up"""
    num_queries: int
    """Without those that fill up."""
    blocks: Tensor
    """int64 [sequences * blocks of all keys]"""
    bias: Tensor
    """float32 [sequences, 1, queries * group, keys]: 0 for keys up to the query's own, -inf beyond"""


def plan_invariant(
    block_tables: Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    num_decodes: int,
    block_size: int,
    group: int,
    multiple: int,
) -> list[InvariantTile]:
    """The calls that one step needs, the same for all layers.

    Args:
        block_size: divides 64.
        group: query heads that share a key head.
        multiple: of the query rows of a key head, that is of tokens times `group`.
    """

    multiple //= gcd(multiple, group)

    def tile(rows: list[int], places: list[list[int]], lengths: list[list[int]]) -> InvariantTile:
        keys, missing = _padded(lengths[0][0]), -len(places[0]) % multiple
        tokens = torch.tensor([each + each[-1:] * missing for each in places])
        ends = torch.tensor([each + each[-1:] * missing for each in lengths]).repeat_interleave(group, dim=1)
        beyond = torch.arange(keys) >= ends[:, :, None]
        bias = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None]
        blocks = block_tables[torch.tensor(rows), : keys // block_size].long()
        lacking = keys // block_size - blocks.shape[1]
        blocks = torch.cat((blocks, blocks[:, :1].expand(-1, lacking)), dim=1)  # any will do: they are masked
        return InvariantTile(tokens, len(places[0]), blocks.reshape(-1), bias)

    tiles: list[InvariantTile] = []
    alike: dict[int, list[int]] = {}
    for row in range(num_decodes):
        alike.setdefault(_padded(seq_lens[row]), []).append(row)
    for rows in alike.values():
        tiles.append(tile(rows, [[row] for row in rows], [[seq_lens[row]] for row in rows]))
    first = num_decodes
    for row in range(num_decodes, len(seq_lens)):
        lengths = range(seq_lens[row] - query_lens[row] + 1, seq_lens[row] + 1)
        for _, part in groupby(lengths, _padded):
            same = list(part)
            for begin in range(0, len(same), _TILE):
                some = same[begin : begin + _TILE]
                tiles.append(tile([row], [[first + length - lengths[0] for length in some]], [some]))
        first += query_lens[row]
    return tiles


def _padded(length: int) -> int:
    """Keys that a token with so many, its own included, is computed with."""
    return next((keys for keys in _SHORT if length <= keys), -(-length // LONG) * LONG)


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
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype)
    for places, used, blocks, bias in tiles:
        count, queries = places.shape
        keys, values = (
            cache.index_select(0, blocks).view(count, -1, kv_heads, head_dim).transpose(1, 2)
            for cache in (k_cache, v_cache)
        )
        # The query heads that share a key head become that head's queries.
        mine = q[places].view(count, queries, kv_heads, -1, head_dim).transpose(1, 2)
        mine = mine.reshape(count, kv_heads, -1, head_dim)
        attended = F.scaled_dot_product_attention(mine, keys, values, attn_mask=bias, scale=scale)
        back = attended.view(count, kv_heads, queries, -1, head_dim).transpose(1, 2)
        out[places[:, :used]] = back[:, :used].reshape(count, used, heads, head_dim)
    return out.view(tokens, heads * head_dim)
