"""Masks of bits: what they do not allow becomes -inf, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from headrace.kernels.forbid_tokens import forbid_tokens, forbid_tokens_reference, forbid_tokens_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "first", "words"), [(70, 0, 3), (5000, 0, 157), (4200, 3001, 226)])
def test_forbids_what_the_masks_do_not_allow(
    device: torch.device, dtype: torch.dtype, columns: int, first: int, words: int
) -> None:
    rng = np.random.default_rng(columns)
    masks = rng.integers(-(2**31), 2**31, (3, words), np.int64).astype(np.int32)
    mask_of_row = [2, -1, 0, 2, -1, 1]
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    wide = torch.randn(6, columns + 24).to(device, dtype)  # rows that are not adjacent
    for forbid in (forbid_tokens, forbid_tokens_triton, forbid_tokens_reference):
        whole = wide.clone()
        logits = whole[:, :columns]
        index = torch.tensor(mask_of_row, dtype=torch.int32, device=device)
        forbid(logits, torch.from_numpy(masks).to(device), index, first)
        expected = wide.clone()
        for row, mask in enumerate(mask_of_row):
            for column in range(columns if mask >= 0 else 0):
                if first + column >= 32 * words or not bits[mask, first + column]:
                    expected[row, column] = -torch.inf
        assert torch.equal(whole, expected)
