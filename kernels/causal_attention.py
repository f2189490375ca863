"""Attention of a whole prompt over itself, dense, by cuDNN: the fastest that torch ships on Hopper.

cuDNN builds a plan for every length, some 30 ms each, so lengths are rounded up to a few. The rows added may
hold anything finite: causality keeps them out of the others' sight. (Its variable-length form is of no use:
torch 2.11 builds a new plan in every call.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SHORTEST = 1536
"""Tokens from which this is faster than `paged_prefill`, which needs no plans and takes all rows at once."""


def padded_length(length: int) -> int:
    """The length that a prompt of `length` tokens is computed at."""
    step = 256
    while length > 16 * step:
        step *= 2
    return -(-length // step) * step


def padded_lengths(longest: int) -> Iterator[int]:
    """All lengths that prompts of up to `longest` tokens are computed at."""
    length = padded_length(SHORTEST)
    while length < longest:
        yield length
        length = padded_length(length + 1)
    yield length


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of one sequence.

    Args:
        q: [length, heads, head_dim]; k, v: [length, kv_heads, head_dim]. The last dimension is dense, and
            `length` one of `padded_lengths`.

    Returns: [length, heads, head_dim].
    """
    if not q.is_cuda:
        return causal_attention_reference(q, k, v, scale)
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    attended: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        queries, keys, values, None, False, 0.0, True, False, scale=scale
    )[0]
    return attended[0].transpose(0, 1)


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`causal_attention` in plain torch."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill_(later, -torch.inf).softmax(-1), values)


def prepare(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Build the plan for prompts of `length` tokens; False if cuDNN has none for such heads on this device.

    It serves q, k and v that are parts of one tensor [., heads + 2 * kv_heads, head_dim].
    """
    if device.type != "cuda" or dtype == torch.float32:
        return False
    qkv = torch.zeros(length, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    try:
        causal_attention(q, k, v, scale)
    except RuntimeError:
        return False
    return True
