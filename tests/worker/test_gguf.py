"""GGUF files, made here with the gguf package's writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import ConfigError
from headrace.worker.models import build_model
from headrace.worker.models.causal_lm import CausalLM
from headrace.worker.parallel import TensorParallel
from headrace.worker.weights import load_weights
from numpy.typing import NDArray

MakeConfig: TypeAlias = Callable[..., EngineConfig]
Tensors: TypeAlias = dict[str, NDArray[np.float32]]
CPU, ALONE = torch.device("cpu"), TensorParallel()
HEADS, KV_HEADS, HEAD_DIM, SIZE, FFN, VOCAB, LAYERS = 4, 2, 16, 64, 96, 40, 2
OPTIONS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": SIZE,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "tie_word_embeddings": True,
}
INNER = {
    "attn_norm": ("input_layernorm", (SIZE,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, SIZE)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, SIZE)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, SIZE)),
    "attn_output": ("self_attn.o_proj", (SIZE, HEADS * HEAD_DIM)),
    "ffn_norm": ("post_attention_layernorm", (SIZE,)),
    "ffn_gate": ("mlp.gate_proj", (FFN, SIZE)),
    "ffn_up": ("mlp.up_proj", (FFN, SIZE)),
    "ffn_down": ("mlp.down_proj", (SIZE, FFN)),
}


def names() -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> (Hugging Face name, shape)."""
    inner = {
        f"blk.{layer}.{ours}.weight": (f"model.layers.{layer}.{theirs}.weight", shape)
        for layer in range(LAYERS)
        for ours, (theirs, shape) in INNER.items()
    }
    outer = {
        "token_embd.weight": ("model.embed_tokens.weight", (VOCAB, SIZE)),
        "output_norm.weight": ("model.norm.weight", (SIZE,)),
    }
    return outer | inner


def permuted(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """As converters to GGUF reorder the rows of llama's queries and keys."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(
    path: Path,
    kind: GGMLQuantizationType,
    architecture: str,
    *,
    leave_out: str = "",
    as_integers: str = "",
) -> Tensors:
    """Write random weights of that type (norms stay float32); returns what a reader should find."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    expected: Tensors = {}
    for name, (hf_name, shape) in names().items():
        values = rng.standard_normal(shape, dtype=np.float32)
        encoded = quantize(values, kind) if len(shape) == 2 else values
        expected[hf_name] = dequantize(encoded, kind) if len(shape) == 2 else values
        if name == leave_out:
            continue
        if architecture == "llama" and "attn_q" in name:
            encoded = permuted(encoded, HEADS)
        if architecture == "llama" and "attn_k" in name:
            encoded = permuted(encoded, KV_HEADS)
        if name == as_integers:
            encoded = values.astype(np.int32)
        is_plain = encoded.dtype in (np.float32, np.float16, np.int32)
        writer.add_tensor(name, encoded, raw_dtype=None if is_plain else kind)
    if architecture == "llama":
        writer.add_tensor("rope_freqs.weight", np.ones(HEAD_DIM // 2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def load(path: Path, make_config: MakeConfig, family: str = "Llama", tp: TensorParallel = ALONE) -> CausalLM:
    options = OPTIONS | {"rope_theta": 1e4}
    model = build_model(f"{family}ForCausalLM", options, torch.float32, CPU, tp, 64)
    load_weights(model, make_config(load_format="gguf", model_path=str(path)), CPU, tp)
    return model


def assert_holds(model: CausalLM, tensors: Tensors) -> None:
    weights = model.weights()
    assert weights.keys() == tensors.keys()
    for name, weight in weights.items():
        assert torch.equal(weight.target, torch.from_numpy(tensors[name])[weight.part]), name


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_types(tmp_path: Path, make_config: MakeConfig, kind: str) -> None:
    path = tmp_path / "model.gguf"
    expected = write(path, GGMLQuantizationType[kind], "llama")
    assert_holds(load(path, make_config), expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_its_part(tmp_path: Path, make_config: MakeConfig, rank: int) -> None:
    path = tmp_path / "model.gguf"
    expected = write(path, GGMLQuantizationType.Q8_0, "llama")
    assert_holds(load(path, make_config, tp=TensorParallel(rank, 2)), expected)


def test_other_architectures_are_not_permuted(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "model.gguf"
    expected = write(path, GGMLQuantizationType.F16, "qwen3")
    with pytest.raises(ConfigError, match=r"lacks tensor 'model\.layers\.0\.self_attn\.q_norm\.weight'"):
        load(path, make_config, "Qwen3")
    assert_holds(load(path, make_config), expected)


def test_a_missing_tensor_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "model.gguf"
    write(path, GGMLQuantizationType.F16, "llama", leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ConfigError, match=r"lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load(path, make_config)


def test_an_unknown_format_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "model.gguf"
    write(path, GGMLQuantizationType.F32, "llama", as_integers="blk.0.attn_v.weight")
    with pytest.raises(ConfigError, match=r"self_attn\.v_proj\.weight' in format I32") as error:
        load(path, make_config)
    assert error.value.value == "I32"


def test_a_truncated_file_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    path = tmp_path / "model.gguf"
    write(path, GGMLQuantizationType.Q4_1, "llama")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"'model\.layers\.1.* the file is truncated"):
        load(path, make_config)
