"""A GGUF header becomes the config.json that the model was made from."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from headrace import ConfigError
from headrace.frontend.gguf_config import config_from_gguf
from headrace.ipc.gguf import GgufHeader, TensorInfo, read_gguf_header

METADATA: dict[str, Any] = {
    "general.architecture": "qwen3",
    "qwen3.embedding_length": 64,
    "qwen3.feed_forward_length": 128,
    "qwen3.block_count": 2,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.attention.key_length": 32,
    "qwen3.context_length": 512,
    "qwen3.rope.freq_base": 1e6,
    "qwen3.attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    "tokenizer.ggml.eos_token_id": 5,
    "tokenizer.ggml.eot_token_id": 7,
}
TENSORS = {"token_embd.weight": TensorInfo((500, 64), 0, 0), "blk.0.attn_q.bias": TensorInfo((64,), 0, 0)}
PATH = Path("x.gguf")


def test_keys() -> None:
    config = config_from_gguf(PATH, GgufHeader(METADATA, TENSORS))
    expected = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "rms_norm_eps": 1e-06,
        "vocab_size": 500,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "eos_token_id": [5, 7],
    }
    assert {key: config[key] for key in expected} == expected


def test_an_output_matrix_is_not_tied() -> None:
    tensors = TENSORS | {"output.weight": TensorInfo((500, 64), 0, 0)}
    assert config_from_gguf(PATH, GgufHeader(METADATA, tensors))["tie_word_embeddings"] is False


def test_llama3_rope_scaling_is_read_from_its_divisors(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"head" + struct.pack("<4f", 1.0, 1.5, 8.0, 32.0))
    tensors = TENSORS | {"rope_freqs.weight": TensorInfo((4,), 0, 4)}
    scaling = config_from_gguf(file, GgufHeader(METADATA, tensors))["rope_scaling"]
    assert (scaling["rope_type"], scaling["factor"]) == ("llama3", 32.0)


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_rope_scaling_is_linear_where_only_a_factor_is_named(
    change: dict[str, Any], scaling: dict[str, Any] | None
) -> None:
    metadata = METADATA | {f"qwen3.{key}": value for key, value in change.items()}
    assert config_from_gguf(PATH, GgufHeader(metadata, TENSORS))["rope_scaling"] == scaling


@pytest.mark.parametrize(("rotated", "factor"), [(32, 1.0), (16, 0.5)])
def test_heads_that_are_rotated_in_part_are_said_to_be(rotated: int, factor: float) -> None:
    metadata = METADATA | {"qwen3.rope.dimension_count": rotated}
    assert config_from_gguf(PATH, GgufHeader(metadata, TENSORS))["partial_rotary_factor"] == factor


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"general.architecture": "mamba"}, "mamba"),
        ({"general.architecture": "llama"}, "llama.embedding_length"),
        ({"qwen3.attention.head_count": 0}, "qwen3.attention.head_count is 0"),
        ({"qwen3.attention.head_count": [4, 2]}, r"qwen3.attention.head_count is \[4, 2\]"),
        ({"qwen3.attention.layer_norm_rms_epsilon": "small"}, "layer_norm_rms_epsilon is 'small'"),
    ],
)
def test_refusals(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        config_from_gguf(PATH, GgufHeader(METADATA | change, TENSORS))


def test_an_alignment_of_nothing_is_no_header(tmp_path: Path) -> None:
    file, key = tmp_path / "x.gguf", b"general.alignment"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<II", 4, 0)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    with pytest.raises(ConfigError, match="is not a readable GGUF file"):
        read_gguf_header(file)
