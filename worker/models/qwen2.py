"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..layers import Place
from .causal_lm import CausalLM
from .llama import Llama, LlamaConfig


def build(hf_config: dict[str, Any], place: Place, max_model_len: int) -> CausalLM:
    """Qwen2 as `hf_config` describes it."""
    config = LlamaConfig.from_hf(hf_config, max_model_len)
    return Llama(replace(config, qkv_bias=True, output_bias=False), place)
