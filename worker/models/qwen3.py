"""Qwen3 (dense): Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layers import Place, RMSNorm, Weights
from .causal_lm import CausalLM
from .llama import Llama, LlamaAttention, LlamaConfig
from .qwen2 import DEFAULTS, refuse_windows


def build(hf_config: dict[str, Any], place: Place, max_model_len: int) -> CausalLM:
    """Qwen3 as `hf_config` describes it."""
    hf_config = DEFAULTS | {"head_dim": 128} | hf_config
    refuse_windows(hf_config, max_model_len)
    config = LlamaConfig.from_hf(hf_config, max_model_len)
    return Llama(replace(config, mlp_bias=False), place, Qwen3Attention)


class Qwen3Attention(LlamaAttention):
    """Attention whose queries and keys are normed, head by head, before their rotation."""

    def __init__(self, config: LlamaConfig, place: Place) -> None:
        super().__init__(config, place)
        self.num_heads = config.num_heads // place.tp.size
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, place)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, place)

    def project(self, x: Tensor) -> Tensor:
        heads = super().project(x)
        kv_heads = (heads.shape[1] - self.num_heads) // 2
        q, k, v = heads.split_with_sizes((self.num_heads, kv_heads, kv_heads), dim=1)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)

    def weights(self, prefix: str) -> Weights:
        norms = self.q_norm.weights(f"{prefix}q_norm") | self.k_norm.weights(f"{prefix}k_norm")
        return super().weights(prefix) | norms
