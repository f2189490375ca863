"""The `config.json` that a GGUF file's header amounts to, so that models know one form of configuration."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from ..ipc.errors import ConfigError
from ..ipc.gguf import GgufHeader

_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}
_REQUIRED = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_GGML_F32 = 0
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_from_gguf(path: Path, header: GgufHeader) -> dict[str, Any]:
    """Keys as in Hugging Face's `config.json`. Raises ConfigError naming what is missing or unknown."""
    metadata = header.metadata
    name = metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        message = (
            f"model: {str(path)!r} holds architecture {name!r}; GGUF files of these can be read: {known}"
        )
        raise ConfigError(message, parameter="model", value=name, limit=known)
    architecture, model_type = _ARCHITECTURES[name]
    missing = [f"{name}.{key}" for key in _REQUIRED.values() if f"{name}.{key}" not in metadata]
    if missing:
        message = f"model: the header of {str(path)!r} lacks {', '.join(missing)}"
        raise ConfigError(message, parameter="model", value=path)
    for key in _REQUIRED.values():
        value = metadata[f"{name}.{key}"]
        if not isinstance(value, int | float) or value <= 0:
            message = (
                f"model: the header of {str(path)!r} says that {name}.{key} is {value!r}, no positive number"
            )
            raise ConfigError(message, parameter="model", value=value, limit="a positive number")
    config: dict[str, Any] = {ours: metadata[f"{name}.{theirs}"] for ours, theirs in _REQUIRED.items()}
    # The header holds float32: 1e-05 comes back as 9.999999747378752e-06.
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    heads = config["num_attention_heads"]
    head_dim = metadata.get(f"{name}.attention.key_length", config["hidden_size"] // heads)
    return config | {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": _vocab_size(header),
        "num_key_value_heads": metadata.get(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rope_theta": metadata.get(f"{name}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(path, header, name),
        "partial_rotary_factor": metadata.get(f"{name}.rope.dimension_count", head_dim) / head_dim,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos(metadata),
        "dtype": "bfloat16",
    }


def _vocab_size(header: GgufHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is not None:
        return embedding.shape[0]
    return len(header.metadata.get("tokenizer.ggml.tokens", ()))


def _eos(metadata: dict[str, Any]) -> list[int]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    return list(dict.fromkeys(metadata[key] for key in keys if key in metadata))


def _rope_scaling(path: Path, header: GgufHeader, name: str) -> dict[str, Any] | None:
    """Llama 3.x scaling is kept as a tensor of divisors, the last of which is the factor."""
    divisors = header.tensors.get("rope_freqs.weight")
    if divisors is not None and divisors.ggml_type == _GGML_F32:
        with path.open("rb") as file:
            file.seek(divisors.offset + 4 * (divisors.shape[0] - 1))
            (factor,) = struct.unpack("<f", file.read(4))
        return {**_LLAMA3_ROPE, "factor": factor}
    metadata = header.metadata
    factor = metadata.get(f"{name}.rope.scaling.factor", metadata.get(f"{name}.rope.scale_linear", 1.0))
    # Files that are older than the other kinds name no kind.
    kind = metadata.get(f"{name}.rope.scaling.type", "none" if factor == 1 else "linear")
    scaling = {"rope_type": kind, "factor": factor}
    if trained := metadata.get(f"{name}.rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = trained
    return None if kind == "none" else scaling
