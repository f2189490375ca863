"""Store the step's keys and values in the paged cache, rotating queries and keys on the way.

Rotary embedding in the layout of Hugging Face checkpoints: component i of a head is paired with component
i + head_dim / 2. A rotation is a row [cos, -sin, sin] of a table; see `worker/rope.py` for the angles.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Copy `k` and `v` [tokens, kv_heads, head_dim] to their slots.

    Args:
        k_cache: [blocks, block_size, kv_heads, head_dim], as `v_cache`.
        slot_mapping: int64 [tokens], block * block_size + offset of each token.
    """
    kv_write_reference(k, v, k_cache, v_cache, slot_mapping)


def rotate_kv_write(
    qkv: Tensor,
    rotation: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotate the queries and keys of `qkv`, store keys and values, return the queries.

    Args:
        qkv: [tokens, heads + 2 * kv_heads, head_dim]; may be overwritten.
        rotation: [tokens, 3, head_dim / 2], each token's [cos, -sin, sin].
        k_cache, v_cache, slot_mapping: as for `kv_write`.

    Returns: [tokens, heads, head_dim].
    """
    return rotate_kv_write_reference(qkv, rotation, k_cache, v_cache, slot_mapping)


def kv_write_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`kv_write` in torch."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


def rotate_kv_write_reference(
    qkv: Tensor,
    rotation: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """`rotate_kv_write` in torch."""
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = k_cache.shape[2]
    heads = all_heads - 2 * kv_heads
    halves = qkv[:, : heads + kv_heads].view(tokens, heads + kv_heads, 2, head_dim // 2)
    cos, sin = rotation[:, None, :1], rotation[:, None, 1:]
    rotated = torch.addcmul(halves * cos, halves.flip(2), sin).view(tokens, heads + kv_heads, head_dim)
    kv_write_reference(rotated[:, heads:], qkv[:, heads + kv_heads :], k_cache, v_cache, slot_mapping)
    return rotated[:, :heads]
