"""OPT: learned positions, layer norms before or after the blocks, a plain feed-forward part, biases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...ipc.errors import ConfigError
from ...kernels.fused_linear import ACTIVATIONS
from ...kernels.kv_write import kv_write
from ...kernels.paged_attention import AttentionMetadata, paged_attention
from ...kernels.vector_linear import Activation
from ..layers import (
    ColumnLinear,
    LayerNorm,
    Linear,
    Output,
    Place,
    RowLinear,
    VocabTable,
    Weights,
    attention_outputs,
)
from .causal_lm import CausalLM, LayerCache, check_multiple, require, size_of

POSITION_OFFSET = 2
"""The table's first rows were meant for padding."""
NORM_EPS = 1e-5


def build(hf_config: dict[str, Any], place: Place, max_model_len: int) -> CausalLM:
    """OPT as `hf_config` describes it."""
    return OPT(OPTConfig.from_hf(hf_config, max_model_len), place)


@dataclass(frozen=True)
class OPTConfig:
    """The numbers that make an OPT."""

    vocab_size: int
    hidden_size: int
    embedding_size: int
    """Differs from `hidden_size` in some sizes, which then project in and out."""
    ffn_size: int
    num_layers: int
    num_heads: int
    num_positions: int
    norm_before: bool
    final_norm: bool
    bias: bool
    tie_embeddings: bool
    activation: Activation

    @classmethod
    def from_hf(cls, hf: dict[str, Any], max_model_len: int) -> OPTConfig:
        """Raises ConfigError for what is not supported."""
        activation: Activation = "gelu" if hf.get("activation_function") == "gelu" else "relu"
        require(hf, activation_function=activation, layer_norm_elementwise_affine=True, is_causal=True)
        hidden_size, num_heads = size_of(hf, "hidden_size"), size_of(hf, "num_attention_heads")
        check_multiple("hidden_size", hidden_size, num_heads)
        num_positions = size_of(hf, "max_position_embeddings")
        if max_model_len > num_positions:
            message = f"max_model_len {max_model_len} exceeds the model's {num_positions} positions"
            raise ConfigError(message, parameter="max_model_len", value=max_model_len, limit=num_positions)
        norm_before = hf.get("do_layer_norm_before", True)
        return cls(
            vocab_size=size_of(hf, "vocab_size"),
            hidden_size=hidden_size,
            embedding_size=hf.get("word_embed_proj_dim") or hidden_size,
            ffn_size=size_of(hf, "ffn_dim"),
            num_layers=size_of(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_positions=num_positions,
            norm_before=norm_before,
            final_norm=norm_before and not hf.get("_remove_final_layer_norm", False),
            bias=hf.get("enable_bias", True),
            tie_embeddings=hf.get("tie_word_embeddings", True),
            activation=activation,
        )


class OPTAttention(nn.Module):
    """Multi-head attention without positions of its own."""

    def __init__(self, config: OPTConfig, place: Place) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_heads
        self.head_dim = size // heads
        outputs = attention_outputs(heads, heads, self.head_dim, place)
        self.qkv_proj = ColumnLinear(size, outputs, config.bias, place)
        self.out_proj = RowLinear(size, size, config.bias, place)

    def forward(self, x: Tensor, cache: LayerCache, meta: AttentionMetadata) -> Tensor:
        """[tokens, hidden_size], both sides."""
        q, k, v = self.qkv_proj(x).view(x.shape[0], 3, -1, self.head_dim).unbind(1)
        kv_write(k, v, *cache, meta.slot_mapping)
        return self.out_proj(paged_attention(q, *cache, meta, self.head_dim**-0.5))  # type: ignore[no-any-return]

    def weights(self, prefix: str) -> Weights:
        return self.qkv_proj.weights(prefix) | self.out_proj.weights(f"{prefix}out_proj")


class OPTLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: OPTConfig, place: Place) -> None:
        super().__init__()
        size, ranks = config.hidden_size, place.tp.size
        place.check_divides(config.ffn_size, "ffn_dim")
        self.norm_before, self.activate = config.norm_before, ACTIVATIONS[config.activation]
        self.attention = OPTAttention(config, place)
        self.attention_norm = LayerNorm(size, NORM_EPS, place)
        self.fc1 = ColumnLinear(size, [Output("fc1", config.ffn_size, ranks)], config.bias, place)
        self.fc2 = RowLinear(config.ffn_size, size, config.bias, place)
        self.ffn_norm = LayerNorm(size, NORM_EPS, place)

    def forward(self, x: Tensor, cache: LayerCache, meta: AttentionMetadata) -> Tensor:
        """[tokens, hidden_size], both sides."""
        if self.norm_before:
            x = x + self.attention(self.attention_norm(x), cache, meta)
            return x + self._feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.attention(x, cache, meta))
        return self.ffn_norm(x + self._feed_forward(x))  # type: ignore[no-any-return]

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activate(self.fc1(x)))  # type: ignore[no-any-return]

    def weights(self, prefix: str) -> Weights:
        return (
            self.attention.weights(f"{prefix}self_attn.")
            | self.attention_norm.weights(f"{prefix}self_attn_layer_norm")
            | self.fc1.weights(prefix)
            | self.fc2.weights(f"{prefix}fc2")
            | self.ffn_norm.weights(f"{prefix}final_layer_norm")
        )


class OPT(CausalLM):
    """The whole model."""

    def __init__(self, config: OPTConfig, place: Place) -> None:
        super().__init__()
        size, embedding_size = config.hidden_size, config.embedding_size
        self.num_layers, self.head_dim = config.num_layers, size // config.num_heads
        self.num_kv_heads = config.num_heads // place.tp.size
        self.vocab_size, self.activation = config.vocab_size, config.activation
        self.embedding = VocabTable(config.vocab_size, embedding_size, place)
        self.positions = Linear(size, config.num_positions + POSITION_OFFSET, False, place)
        self.project_in = self.project_out = None
        if embedding_size != size:
            self.project_in = Linear(embedding_size, size, False, place)
            self.project_out = Linear(size, embedding_size, False, place)
        self.layers = nn.ModuleList(OPTLayer(config, place) for _ in range(config.num_layers))
        self.norm = LayerNorm(size, NORM_EPS, place) if config.final_norm else None
        self.is_tied = config.tie_embeddings
        self.head = self.embedding if self.is_tied else VocabTable(config.vocab_size, embedding_size, place)
        self.ignored_weights = ("lm_head.weight",) if self.is_tied else ()

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Sequence[LayerCache], meta: AttentionMetadata
    ) -> Tensor:
        x = self.embedding.embed(input_ids)
        if self.project_in is not None:
            x = self.project_in(x)
        x = x + F.embedding(positions + POSITION_OFFSET, self.positions.weight)
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, layer_cache, meta)
        return x if self.norm is None else self.norm(x)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        if self.project_out is not None:
            hidden = self.project_out(hidden)
        return self.head.logits(hidden)

    def canonical_name(self, name: str) -> str:
        return f"model.{name}" if name.startswith("decoder.") else name

    def weights(self) -> Weights:
        prefix = "model.decoder."
        weights = self.embedding.weights(f"{prefix}embed_tokens")
        weights |= self.positions.weights(f"{prefix}embed_positions")
        for name in ("project_in", "project_out"):
            if (projection := getattr(self, name)) is not None:
                weights |= projection.weights(f"{prefix}{name}")
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, OPTLayer)
            weights |= layer.weights(f"{prefix}layers.{number}.")
        if self.norm is not None:
            weights |= self.norm.weights(f"{prefix}final_layer_norm")
        return weights if self.is_tied else weights | self.head.weights("lm_head")
