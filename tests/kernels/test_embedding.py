"""Embedding: exact."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.embedding import embed, embed_reference, embed_triton


@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (5, 100)])
def test_rows_of_the_table(device: torch.device, tokens: int, size: int) -> None:
    table = torch.randn(11, size).to(device, torch.bfloat16)
    ids = torch.randint(0, 11, (tokens,)).to(device)
    expected = embed_reference(ids, table)
    assert torch.equal(embed_triton(ids, table), expected)
    assert torch.equal(embed(ids, table), expected)
