"""Mistral: Llama with an attention window."""

from __future__ import annotations

from typing import Any

from ..layers import Place
from .causal_lm import CausalLM, refuse_sliding_window
from .llama import Llama, LlamaConfig

_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}
"""What transformers takes for what a config leaves out, and a Llama's does not."""


def build(hf_config: dict[str, Any], place: Place, max_model_len: int) -> CausalLM:
    """Mistral as `hf_config` describes it."""
    hf_config = _DEFAULTS | hf_config
    refuse_sliding_window(hf_config["sliding_window"], max_model_len)
    return Llama(LlamaConfig.from_hf(hf_config, max_model_len), place)
