"""Decode steps of many rows, whose attention is planned differently, beside the same rows in four steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from headrace.kernels.decode_plan import MANY_ROWS, leaves_whole
from headrace.kernels.slot_table import StepInputs
from headrace.worker.fused import fold_norms, fuse
from headrace.worker.models import build_model
from headrace.worker.parallel import TensorParallel
from torch import Tensor

ROWS, BLOCK, LONGEST = MANY_ROWS + 3, 16, 300
HF: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST + 1,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "head_dim"), [("LlamaForCausalLM", 64), ("Qwen2ForCausalLM", 128), ("Qwen3ForCausalLM", 64)]
)
def test_many_rows_attend_as_few_do(family: str, head_dim: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda")
    hf = HF | {"head_dim": head_dim}
    model = build_model(family, hf, torch.bfloat16, device, TensorParallel(), LONGEST + 1).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.05) + ("norm" in name))
    fold_norms(model)
    lengths = torch.randint(1, LONGEST, (ROWS,), device=device, dtype=torch.int32)
    blocks_each = -(-LONGEST // BLOCK)
    tables = torch.randperm(ROWS * blocks_each, device=device).int().view(ROWS, blocks_each)
    slots = torch.randperm(ROWS, device=device).int()
    shape = (3, 2, ROWS * blocks_each, BLOCK, 2, head_dim)
    first = torch.randn(shape, device=device).bfloat16()

    def logits(parts: int) -> Tensor:
        """Of two steps, each computed in so many parts."""
        caches = [(k, v) for k, v in first.clone()]
        fused = fuse(model, caches, tables, 8, ROWS)
        assert fused is not None
        found = []
        for step in range(2):
            positions = (lengths + step - 1).long()
            blocks = tables[slots.long(), positions // BLOCK].long()
            whole = StepInputs(
                positions * 31 % 1000, positions, blocks * BLOCK + positions % BLOCK, lengths + step
            )
            for rows in torch.arange(ROWS, device=device).chunk(parts):
                found.append(fused.decode(StepInputs(*(tensor[rows] for tensor in whole)), slots[rows]))
        return torch.cat(found).float()

    assert leaves_whole(ROWS, 2)
    assert not leaves_whole(-(-ROWS // 4), 2)
    expected = logits(4)
    error = (logits(1) - expected).norm() / expected.norm()
    assert expected.std() > 0.1
    assert error < 0.02, f"relative error {error:.2e}"
