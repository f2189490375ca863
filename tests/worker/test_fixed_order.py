"""Models by kernels that sum in a fixed order compute what their `forward` computes: interpreted kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from headrace.ipc.errors import ConfigError
from headrace.ipc.messages import Admit, Sampling, StepPlan, pack
from headrace.worker.device_slots import DeviceSlots
from headrace.worker.device_step import DeviceStep
from headrace.worker.fused import fold_norms
from headrace.worker.models import build_model
from headrace.worker.models.causal_lm import CausalLM
from headrace.worker.parallel import TensorParallel
from torch import Tensor

CPU = torch.device("cpu")
SLOTS, MAX_LEN, BLOCK, HEADS = 2, 32, 4, 4
HF: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
}
OPT = {"num_key_value_heads": HEADS}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-256": ("Llama", {"head_dim": 256}),
    "llama": ("Llama", {"mlp_bias": True, "attention_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "opt": ("OPT", OPT),
    "opt-350m": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-gelu": ("OPT", OPT | {"activation_function": "gelu"}),
}

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="in the interpreter; tests/gpu has its like"
)


def build(name: str, dtype: torch.dtype) -> CausalLM:
    family, options = MODELS[name]
    torch.manual_seed(0)
    model = build_model(f"{family}ForCausalLM", HF | options, dtype, CPU, TensorParallel(), MAX_LEN)
    for parameter_name, parameter in model.named_parameters():
        is_norm = "norm" in parameter_name and parameter_name.endswith("weight")
        parameter.copy_(torch.randn_like(parameter) * (0.3 if is_norm else 0.15) + is_norm)
    return model.eval()


@torch.inference_mode()
def logits_of(model: CausalLM, batch_invariant: bool, dtype: torch.dtype) -> Tensor:
    """A whole prompt and a chunk; the next chunk beside a decode; two decodes."""
    blocks = MAX_LEN // BLOCK
    slots = DeviceSlots(CPU, SLOTS, MAX_LEN, BLOCK, SLOTS * blocks)
    shape = (SLOTS * blocks + 1, BLOCK, model.num_kv_heads, model.head_dim)
    caches = [
        (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(model.num_layers)
    ]
    step = DeviceStep(model, caches, slots, HEADS, batch_invariant=batch_invariant)
    prompts = [[i * 7 % 50 for i in range(14)], [i * 3 % 50 for i in range(5)]]
    admitted = [
        Admit(
            slot, pack(p), len(p), 0, pack(range(slot * blocks, (slot + 1) * blocks)), Sampling(temperature=0)
        )
        for slot, p in enumerate(prompts)
    ]
    found = []
    for number, counts in enumerate(([11, 5], [3, 1], [1, 1])):
        new = admitted if number == 0 else []
        work = slots.apply(StepPlan(number, b"", new, b"", pack(range(2)), pack(counts)))
        drawn = step.decode_logits(2) if work.decode else step.packed_logits(work)
        assert drawn is not None
        found.append(drawn.logits.float())
        step.draw(drawn)
    return torch.cat(found)


def test_heads_too_wide_for_float32_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"heads of at most 128 on GPUs; this model's are of 256") as caught:
        logits_of(build("llama-256", torch.float32), True, torch.float32)
    assert caught.value.parameter == "batch_invariant"


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama-256"])
def test_as_forward(name: str) -> None:
    model = build(name, torch.float32)
    expected = logits_of(model, False, torch.float32)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits_of(model, True, torch.float32), expected, atol=1e-4, rtol=1e-4)


def test_with_folded_norms() -> None:
    expected = logits_of(build("qwen2", torch.bfloat16), False, torch.bfloat16)
    folded = build("qwen2", torch.bfloat16)
    fold_norms(folded)
    assert folded.norms_are_folded
    error = (logits_of(folded, True, torch.bfloat16) - expected).norm() / expected.norm()
    assert error < 0.03, f"relative error {error:.2e}"
