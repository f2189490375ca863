"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, and maybe attention windows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..layers import Place
from .causal_lm import CausalLM, refuse_sliding_window
from .llama import Llama, LlamaConfig

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
"""What transformers takes for what a config leaves out, and a Llama's does not."""


def build(hf_config: dict[str, Any], place: Place, max_model_len: int) -> CausalLM:
    """Qwen2 as `hf_config` describes it."""
    hf_config = DEFAULTS | hf_config
    refuse_windows(hf_config, max_model_len)
    config = LlamaConfig.from_hf(hf_config, max_model_len)
    return Llama(replace(config, qkv_bias=True, output_bias=False, mlp_bias=False), place)


def refuse_windows(hf_config: dict[str, Any], max_model_len: int) -> None:
    """Raise ConfigError when a sequence could outgrow a layer's window. The config has all `DEFAULTS`."""
    if not hf_config["use_sliding_window"]:
        return
    layer_types = hf_config.get("layer_types")
    if layer_types is None:
        slides = hf_config["max_window_layers"] < hf_config["num_hidden_layers"]
    else:
        slides = "sliding_attention" in layer_types
    if slides:
        refuse_sliding_window(hf_config["sliding_window"], max_model_len)
