"""Store the step's keys and values in the paged cache, rotating queries and keys on the way.

Rotary embedding in the layout of Hugging Face checkpoints: component i of a head is paired with component
i + head_dim / 2. A rotation is a row [cos, -sin, sin] of a table; see `worker/rope.py` for the angles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous
from .rms_norm import row_scale

_HEADS = 16
"""Heads that one program rotates: 16 heads of 64 are 2 KiB, enough for wide loads by four warps."""


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
    if qkv.is_cuda:
        return rotate_kv_write_triton(qkv, rotation, k_cache, v_cache, slot_mapping)
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


# --- Triton ------------------------------------------------------------------------------------------


def rotate_kv_write_triton(
    qkv: Tensor,
    rotation: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """`rotate_kv_write` in one launch, in place: of a dense `qkv`, the queries and keys come out rotated."""
    finish_heads(qkv, k_cache, v_cache, slot_mapping, rotation=rotation)
    return qkv[:, : qkv.shape[1] - 2 * k_cache.shape[2]]


def finish_heads(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    rotation: Tensor | None = None,
    positions: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    late: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """What happens to projections before attention, in place and in one launch: norm, rotate, store.

    Args:
        qkv: [tokens, heads + 2 * kv_heads, head_dim], dense.
        rotation: [., 3, head_dim / 2]; None: no rotary embedding.
        positions: int64 [tokens], each token's row of `rotation`; None: token i has row i.
        q_norm, k_norm: [head_dim], weights of an RMS norm of each head; None: no norm.
        late: [tokens, in_features], the input of the projections, whose RMS norm (with `eps`) is still to be
            applied (its weight is in the projections).
        bias: [(heads + 2 * kv_heads) * head_dim], to be added after `late`'s norm; not without `late`.
        k_cache, v_cache, slot_mapping: as for `kv_write`.
    """
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = k_cache.shape[2]
    assert qkv.is_contiguous()
    assert rotation is None or rotation.is_contiguous()
    _finish_heads_kernel[tokens, triton.cdiv(all_heads, _HEADS)](
        qkv,
        qkv if rotation is None else rotation,
        slot_mapping if positions is None else positions,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        qkv if late is None else late,
        qkv if bias is None else bias,
        k_cache,
        v_cache,
        slot_mapping,
        eps,
        HEADS=all_heads - 2 * kv_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        ROTATE=rotation is not None,
        INDEXED=positions is not None,
        NORM=q_norm is not None,
        LATE=0 if late is None else late.shape[1],
        HAS_BIAS=bias is not None,
        BLOCK=_HEADS,
        **pdl_options(qkv),
    )


# Not by alignments: see `slot_table`.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slot_mapping_ptr"])
def _finish_heads_kernel(
    qkv_ptr,  # [tokens, HEADS + 2 * KV_HEADS, HEAD_DIM]
    rotation_ptr,  # [., 3, HEAD_DIM / 2]
    positions_ptr,  # int64 [tokens]
    q_norm_ptr,  # [HEAD_DIM]
    k_norm_ptr,  # [HEAD_DIM]
    late_ptr,  # [tokens, LATE]
    bias_ptr,  # [(HEADS + 2 * KV_HEADS) * HEAD_DIM]
    k_cache_ptr,  # [slots, KV_HEADS, HEAD_DIM]
    v_cache_ptr,  # [slots, KV_HEADS, HEAD_DIM]
    slot_mapping_ptr,  # int64 [tokens]
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROTATE: tl.constexpr,
    INDEXED: tl.constexpr,
    NORM: tl.constexpr,
    LATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    allow_next(PDL)
    wait_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    half: tl.constexpr = HEAD_DIM // 2
    column = tl.arange(0, HALF)[None, :]
    in_half = column < half
    inside = in_half & (head < HEADS + 2 * KV_HEADS)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    place = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + column
    low = tl.load(place, mask=inside, other=0.0)
    high = tl.load(place + half, mask=inside, other=0.0)
    if LATE:
        factor = row_scale(late_ptr + token * LATE, eps, LATE)
        low_bias = 0.0
        high_bias = 0.0
        if HAS_BIAS:
            biases = bias_ptr + head * HEAD_DIM + column
            low_bias = tl.load(biases, mask=inside, other=0.0).to(tl.float32)
            high_bias = tl.load(biases + half, mask=inside, other=0.0).to(tl.float32)
        low = (low.to(tl.float32) * factor + low_bias).to(low.dtype)
        high = (high.to(tl.float32) * factor + high_bias).to(high.dtype)
    if NORM:
        first, second = low.to(tl.float32), high.to(tl.float32)
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / HEAD_DIM + eps)[:, None]
        low_weight = tl.where(
            is_query,
            tl.load(q_norm_ptr + column, mask=in_half, other=0.0),
            tl.load(k_norm_ptr + column, mask=in_half, other=0.0),
        ).to(tl.float32)
        high_weight = tl.where(
            is_query,
            tl.load(q_norm_ptr + half + column, mask=in_half, other=0.0),
            tl.load(k_norm_ptr + half + column, mask=in_half, other=0.0),
        ).to(tl.float32)
        low = tl.where(is_value, low, (first * scale * low_weight).to(low.dtype))
        high = tl.where(is_value, high, (second * scale * high_weight).to(high.dtype))
    if ROTATE:
        row = token
        if INDEXED:
            row = tl.load(positions_ptr + token)
        angle = rotation_ptr + row * 3 * half + column
        cos = tl.load(angle, mask=in_half, other=0.0).to(tl.float32)
        sin = tl.load(angle + 2 * half, mask=in_half, other=0.0).to(tl.float32)
        first, second = low.to(tl.float32), high.to(tl.float32)
        low = tl.where(is_value, low, (first * cos - second * sin).to(low.dtype))
        high = tl.where(is_value, high, (second * cos + first * sin).to(high.dtype))
    if NORM or ROTATE or LATE:
        changed = inside & (head < HEADS + KV_HEADS)
        tl.store(place, low, mask=changed)
        tl.store(place + half, high, mask=changed)

    slot = tl.load(slot_mapping_ptr + token)
    is_key = inside & (head >= HEADS) & (head < HEADS + KV_HEADS)
    key = k_cache_ptr + (slot * KV_HEADS + head - HEADS) * HEAD_DIM + column
    tl.store(key, low, mask=is_key)
    tl.store(key + half, high, mask=is_key)
    value = v_cache_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM + column
    tl.store(value, low, mask=inside & is_value)
    tl.store(value + half, high, mask=inside & is_value)
