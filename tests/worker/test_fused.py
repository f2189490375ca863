"""Fused models: norms that are folded into the matrices change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from headrace.kernels.slot_table import StepInputs
from headrace.worker.fused import HALVED_FROM, Fused, Packed, fold_norms, fuse
from headrace.worker.models import build_model
from headrace.worker.models.causal_lm import CausalLM
from headrace.worker.parallel import TensorParallel
from torch import Tensor

ROWS = 17  # more than the kernels for small batches take
BLOCK = 4
HF: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def build(family: str, tp: TensorParallel | None = None) -> CausalLM:
    torch.manual_seed(0)
    model = build_model(family, HF, torch.bfloat16, torch.device("cpu"), tp or TensorParallel(), 64)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name else 0.15) + ("norm" in name))
    return model.eval()


def fused_of(model: CausalLM, tables: Tensor) -> Fused:
    shape, dtype = (ROWS, BLOCK, model.num_kv_heads, 16), next(model.parameters()).dtype
    caches = [
        (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(model.num_layers)
    ]
    fused = fuse(model, caches, tables.contiguous(), 2 * model.num_kv_heads, ROWS)
    assert fused is not None
    return fused


@torch.inference_mode()
def decoded(model: CausalLM) -> Tensor:
    """Logits of two tokens of every row."""
    rows = torch.arange(ROWS, dtype=torch.int32)
    fused, found = fused_of(model, rows.view(-1, 1)), []
    for position in range(2):
        ids = (rows.long() * 7 + 3 * position) % 50
        inputs = StepInputs(
            ids, torch.full_like(ids, position), rows.long() * BLOCK + position, rows * 0 + position + 1
        )
        found.append(fused.decode(inputs, rows))
    return torch.cat(found).float()


@torch.inference_mode()
def prompted(model: CausalLM) -> Tensor:
    """Logits of all tokens of a prompt."""
    place = torch.arange(3 * ROWS)
    inputs = StepInputs(place % 50, place, place, torch.tensor([len(place)], dtype=torch.int32))
    fused = fused_of(model, torch.arange(ROWS, dtype=torch.int32)[None])
    firsts = range(0, len(place), fused.tile_tokens)
    tiles = torch.tensor([[0, first] for first in firsts], dtype=torch.int32)
    start = torch.tensor([0, len(place)], dtype=torch.int32)
    step = Packed(inputs, torch.zeros(1, dtype=torch.int32), start, 0, tiles)
    logits = fused.packed(step, place.int())
    assert logits is not None
    return logits.float()


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter; tests/gpu has its like")
@pytest.mark.parametrize("logits_of", [decoded, prompted])
def test_folded_norms_change_nothing_of_note(logits_of: Callable[[CausalLM], Tensor]) -> None:
    plain, folded = build("Qwen2ForCausalLM"), build("Qwen2ForCausalLM")
    fold_norms(folded)
    expected = logits_of(plain)
    error = (logits_of(folded) - expected).norm() / expected.norm()
    assert expected.std() > 0.1
    assert error < 0.03, f"relative error {error:.2e}"


def test_products_in_float16_keep_their_norms_before_them() -> None:
    model = build("LlamaForCausalLM").half()
    fold_norms(model)
    assert not model.norms_are_folded


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter; tests/gpu has its like")
@pytest.mark.parametrize("logits_of", [decoded, prompted])
def test_float16_is_nearer_to_float32_than_bfloat16(logits_of: Callable[[CausalLM], Tensor]) -> None:
    dtypes = torch.float32, torch.bfloat16, torch.float16
    expected, *others = (logits_of(build("LlamaForCausalLM").to(dtype)) for dtype in dtypes)
    errors = [float((logits - expected).norm() / expected.norm()) for logits in others]
    assert expected.std() > 0.1
    assert errors[0] < 0.03
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize(
    "peculiarity",
    [{"_remove_final_layer_norm": True}, {"word_embed_proj_dim": 32}, {"do_layer_norm_before": False}],
)
def test_an_opt_of_another_build_runs_its_forward(peculiarity: dict[str, Any]) -> None:
    options = HF | {"ffn_dim": 96} | peculiarity
    opt = build_model("OPTForCausalLM", options, torch.float32, torch.device("cpu"), TensorParallel(), 64)
    shape = (ROWS, BLOCK, 4, 16)
    caches = [(torch.zeros(shape), torch.zeros(shape))]
    assert fuse(opt, caches, torch.zeros(ROWS, 1, dtype=torch.int32), 4, ROWS) is None


class Left(TensorParallel):
    """Of two ranks, that leaves so many tensors of a sum to be added; the peer's are half as large."""

    num_updates: ClassVar[int]

    def add_all_reduced(
        self, partial: Tensor, residual: Tensor, squares: Tensor | None = None
    ) -> Callable[[], tuple[Tensor, ...]]:
        parts = (partial, partial / 2)
        if self.num_updates == 2:
            return lambda: parts
        if self.num_updates == 1:
            return lambda: (parts[0] + parts[1],)
        residual += parts[0] + parts[1]
        return tuple


@torch.inference_mode()
@pytest.mark.parametrize("halved_from", [HALVED_FROM, 2])
def test_what_is_left_to_add_is_added(halved_from: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.worker.fused.HALVED_FROM", halved_from)
    found = []
    for count in range(3):
        monkeypatch.setattr(Left, "num_updates", count, raising=False)
        found.append(prompted(build("LlamaForCausalLM", Left(rank=0, size=2))))
    assert found[0].std() > 0.1
    for logits in found[1:]:
        error = (logits - found[0]).norm() / found[0].norm()
        assert error < 0.03, f"relative error {error:.2e}"
