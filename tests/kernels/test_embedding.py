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


def test_a_share_of_the_table_gives_zeros_for_the_rest(device: torch.device) -> None:
    table = torch.randn(5, 64).to(device, torch.bfloat16)
    ids = torch.tensor([2, 3, 7, 8, 0], device=device)
    expected = torch.zeros(5, 64, dtype=torch.bfloat16, device=device)
    expected[1:3] = table[[0, 4]]
    assert torch.equal(embed_triton(ids, table, first=3), expected)
    assert torch.equal(embed_reference(ids, table, first=3), expected)
