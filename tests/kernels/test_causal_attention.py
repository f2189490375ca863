"""A whole prompt's attention, and the lengths that it is computed at."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.causal_attention import (
    SHORTEST,
    causal_attention,
    causal_attention_reference,
    padded_length,
    padded_lengths,
    prepare,
)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (4, 4, 128), (12, 2, 128)])
def test_against_float64(heads: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    scale = head_dim**-0.5
    if device.type == "cuda" and not prepare(256, heads, kv_heads, head_dim, scale, dtype, device):
        pytest.skip("cuDNN has no plan for these heads here")
    qkv = torch.randn(256, heads + 2 * kv_heads, head_dim, device=device).to(dtype)
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    exact = causal_attention_reference(q.double(), k.double(), v.double(), scale)
    error = (causal_attention(q, k, v, scale).double() - exact).norm() / exact.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_few_lengths_hold_all_prompts_closely() -> None:
    lengths = list(padded_lengths(16384))
    assert lengths[-1] == 16384
    assert len(lengths) < 30
    for length in range(SHORTEST, 16385, 37):
        padded = padded_length(length)
        assert length <= padded < 1.17 * length
        assert padded in lengths
