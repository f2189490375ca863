"""The angles of rotary embeddings: frequencies from a Hugging Face config, and the table made of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ipc.errors import ConfigError


def rotation_table(hf_config: dict[str, Any], head_dim: int, max_model_len: int) -> Tensor:
    """float32 [max_model_len, 3, head_dim / 2]: cos, -sin and sin of each position's angles, with YaRN also
    times what sharpens its attention.

    Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before; where a config has
    both, that is the one). Raises ConfigError for a kind of scaling that is not known here, and for numbers
    that are missing.
    """
    rope = _parameters(hf_config)
    frequencies = _frequencies(hf_config, rope, head_dim, max_model_len)
    angles = torch.outer(torch.arange(max_model_len, dtype=torch.float32), frequencies)
    scale = _yarn_scale(rope) if _kind(rope) == "yarn" else 1.0
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.stack((cos, -sin, sin), dim=1)


def _kind(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _frequencies(
    hf_config: dict[str, Any], rope: dict[str, Any], head_dim: int, max_model_len: int
) -> Tensor:
    """float32 [head_dim / 2], radians per position."""
    rotated = rope.get("partial_rotary_factor", hf_config.get("partial_rotary_factor", 1.0))
    if rotated != 1.0:
        raise _unsupported("partial_rotary_factor", rotated, "1.0")
    # These operations, in this order: at position 100000 another rounding turns the fastest pairs by 0.01.
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / torch.pow(_number(rope, "rope_theta"), exponents)
    match _kind(rope):
        case "default":
            return plain
        case "linear":
            return plain / _number(rope, "factor")
        case "llama3":
            return _llama3(plain, rope)
        case "yarn":
            return _yarn(plain, rope)
        case "dynamic":
            _require_trained_length(hf_config, max_model_len)
            return plain
    raise _unsupported("rope_type", _kind(rope), "default, linear, dynamic, llama3 or yarn")


def _parameters(hf_config: dict[str, Any]) -> dict[str, Any]:
    scaling = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    trained = hf_config.get("max_position_embeddings")
    defaults = {
        "rope_theta": hf_config.get("rope_theta") or 10_000.0,
        "original_max_position_embeddings": trained,
    }
    rope = defaults | {name: value for name, value in scaling.items() if value is not None}
    if original := hf_config.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = original
    if _kind(rope) == "yarn" and "factor" not in rope:
        reached = _number(hf_config, "max_position_embeddings")
        rope["factor"] = reached / _number(rope, "original_max_position_embeddings")
    return rope


def _number(values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        return float(value)
    raise ConfigError(
        f"the model's config has {name} {value!r}, where its rope scaling needs a positive number",
        parameter=name,
        value=value,
        limit="a positive number",
    )


def _require_trained_length(hf_config: dict[str, Any], max_model_len: int) -> None:
    """Dynamic scaling changes nothing up to the trained length; beyond it we would be wrong."""
    trained = int(_number(hf_config, "max_position_embeddings"))
    if max_model_len > trained:
        raise ConfigError(
            f"max_model_len {max_model_len} needs dynamic rope scaling, which is not supported: "
            f"at most {trained} tokens work with this model",
            parameter="max_model_len",
            value=max_model_len,
            limit=trained,
        )


def _llama3(plain: Tensor, rope: dict[str, Any]) -> Tensor:
    """Wavelengths that fit `high_freq_factor` times into the trained length stay, those that do not fit
    `low_freq_factor` times are stretched by `factor`, and between the two it changes smoothly.
    """
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    repeats = _number(rope, "original_max_position_embeddings") / (2 * math.pi / plain)
    kept = ((repeats - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / _number(rope, "factor") + kept * plain


def _yarn(plain: Tensor, rope: dict[str, Any]) -> Tensor:
    """Pairs that turn `beta_fast` times within the trained length stay, those that turn `beta_slow` times are
    stretched by `factor`, and between the two it changes evenly from pair to pair.

    Source: YaRN, https://arxiv.org/abs/2309.00071.
    """
    half, base = len(plain), _number(rope, "rope_theta")
    trained = _number(rope, "original_max_position_embeddings")

    def pair(turns: float) -> float:
        """The one that turns so often."""
        return 2 * half * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = pair(_number({"beta_fast": 32} | rope, "beta_fast"))
    last = pair(_number({"beta_slow": 1} | rope, "beta_slow"))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    kept = 1 - ((torch.arange(half, dtype=torch.float32) - first) / ((last - first) or 0.001)).clamp(0, 1)
    return plain / _number(rope, "factor") * (1 - kept) + plain * kept


def _yarn_scale(rope: dict[str, Any]) -> float:
    """Of queries and of keys."""
    if "attention_factor" in rope:
        return _number(rope, "attention_factor")

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    factor = _number(rope, "factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(_number(rope, "mscale")) / scale(_number(rope, "mscale_all_dim"))
    return scale(1)


def _unsupported(name: str, value: object, limit: str) -> ConfigError:
    return ConfigError(
        f"{name} {value!r} of the model's config is not supported, only {limit}",
        parameter=name,
        value=value,
        limit=limit,
    )
