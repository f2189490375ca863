"""Llama. Parts of it serve the models that vary it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...kernels.kv_write import rotate_kv_write
from ...kernels.paged_attention import AttentionMetadata, paged_attention
from ..layers import ColumnLinear, Output, Place, RMSNorm, RowLinear, VocabTable, Weights, attention_outputs
from ..rope import rotation_table
from .causal_lm import CausalLM, LayerCache, check_multiple, refuse_sliding_window, require, size_of


def build(hf_config: dict[str, Any], place: Place, max_model_len: int) -> CausalLM:
    """Llama as `hf_config` describes it."""
    if "sliding_attention" in (hf_config.get("layer_types") or ["sliding_attention"]):
        refuse_sliding_window(hf_config.get("sliding_window"), max_model_len)
    return Llama(LlamaConfig.from_hf(hf_config, max_model_len), place)


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers that make a Llama."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tie_embeddings: bool
    rotation: Tensor
    """[max_model_len, 3, head_dim / 2], see `rotation_table`."""

    @classmethod
    def from_hf(cls, hf: dict[str, Any], max_model_len: int) -> LlamaConfig:
        """Raises ConfigError for what is not supported."""
        require(hf, hidden_act="silu", is_causal=True)
        hidden_size, num_heads = size_of(hf, "hidden_size"), size_of(hf, "num_attention_heads")
        head_dim = hf.get("head_dim") or hidden_size // num_heads
        num_kv_heads = hf.get("num_key_value_heads") or num_heads
        check_multiple("num_attention_heads", num_heads, num_kv_heads)
        check_multiple("head_dim", head_dim, 2)
        return cls(
            vocab_size=size_of(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=size_of(hf, "intermediate_size"),
            num_layers=size_of(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            qkv_bias=hf.get("attention_bias", False),
            output_bias=hf.get("attention_bias", False),
            mlp_bias=hf.get("mlp_bias", False),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            rotation=rotation_table(hf, head_dim, max_model_len),
        )


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, place: Place) -> None:
        super().__init__()
        heads, head_dim = config.num_heads, config.head_dim
        outputs = attention_outputs(heads, config.num_kv_heads, head_dim, place)
        self.qkv_proj = ColumnLinear(config.hidden_size, outputs, config.qkv_bias, place)
        self.o_proj = RowLinear(heads * head_dim, config.hidden_size, config.output_bias, place)
        self.head_dim, self.scale = head_dim, head_dim**-0.5

    def forward(self, x: Tensor, rotation: Tensor, cache: LayerCache, meta: AttentionMetadata) -> Tensor:
        """[tokens, hidden_size], both sides."""
        qkv = self.project(x)
        q = rotate_kv_write(qkv, rotation, *cache, meta.slot_mapping)
        return self.o_proj(paged_attention(q, *cache, meta, self.scale))  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> Tensor:
        """Queries, keys and values [tokens, heads + 2 * kv_heads, head_dim], before their rotation."""
        return self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)  # type: ignore[no-any-return]

    def weights(self, prefix: str) -> Weights:
        return self.qkv_proj.weights(prefix) | self.o_proj.weights(f"{prefix}o_proj")


class LlamaMLP(nn.Module):
    """The gated feed-forward part of a layer."""

    def __init__(self, config: LlamaConfig, place: Place) -> None:
        super().__init__()
        size, ranks = config.intermediate_size, place.tp.size
        place.check_divides(size, "intermediate_size")
        outputs = [Output("gate_proj", size, ranks), Output("up_proj", size, ranks)]
        self.gate_up_proj = ColumnLinear(config.hidden_size, outputs, config.mlp_bias, place)
        self.down_proj = RowLinear(size, config.hidden_size, config.mlp_bias, place)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden_size], both sides."""
        return self.down_proj(self.down_proj.row_wise.silu_mul(self.gate_up_proj(x)))  # type: ignore[no-any-return]

    def weights(self, prefix: str) -> Weights:
        return self.gate_up_proj.weights(prefix) | self.down_proj.weights(f"{prefix}down_proj")


class LlamaLayer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: LlamaConfig, place: Place, attention: type[LlamaAttention]) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.attention = attention(config, place)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.mlp = LlamaMLP(config, place)

    def forward(
        self,
        residual: Tensor,
        update: Tensor | None,
        rotation: Tensor,
        cache: LayerCache,
        meta: AttentionMetadata,
    ) -> Tensor:
        """Adds `update`, the layer before's result, to `residual` in place; returns its own.

        Handing the last addition on lets the next norm do both in one pass.
        """
        attended = self.attention(self.input_norm(residual, update), rotation, cache, meta)
        return self.mlp(self.mlp_norm(residual, attended))  # type: ignore[no-any-return]

    def weights(self, prefix: str) -> Weights:
        return (
            self.input_norm.weights(f"{prefix}input_layernorm")
            | self.attention.weights(f"{prefix}self_attn.")
            | self.mlp_norm.weights(f"{prefix}post_attention_layernorm")
            | self.mlp.weights(f"{prefix}mlp.")
        )


class Llama(CausalLM):
    """The whole model."""

    def __init__(
        self, config: LlamaConfig, place: Place, attention: type[LlamaAttention] = LlamaAttention
    ) -> None:
        super().__init__()
        self.num_layers, self.head_dim = config.num_layers, config.head_dim
        self.num_kv_heads = max(1, config.num_kv_heads // place.tp.size)
        self.vocab_size = config.vocab_size
        self.embedding = VocabTable(config.vocab_size, config.hidden_size, place)
        self.layers = nn.ModuleList(LlamaLayer(config, place, attention) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, place)
        self.is_tied = config.tie_embeddings
        self.ignored_weights = ("rotary_emb.inv_freq", *(["lm_head.weight"] if self.is_tied else []))
        self.head = (
            self.embedding if self.is_tied else VocabTable(config.vocab_size, config.hidden_size, place)
        )
        self.rotation = config.rotation.to(place.device, place.dtype)
        self.norms_are_folded = False

    def fold_norms(self) -> None:
        """Multiply the weights of each layer's norms into the matrices behind them: what is left of a norm is
        a factor per row, which may as well be applied to the product.
        """
        for layer in self.layers:
            assert isinstance(layer, LlamaLayer)
            pairs = (
                (layer.input_norm, layer.attention.qkv_proj),
                (layer.mlp_norm, layer.mlp.gate_up_proj),
            )
            for norm, linear in pairs:
                linear.weight.mul_(norm.weight)
                norm.weight.fill_(1)
        self.norms_are_folded = True

    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Sequence[LayerCache], meta: AttentionMetadata
    ) -> Tensor:
        rotation = self.rotation.index_select(0, positions)
        residual, update = self.embedding.embed(input_ids), None
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            update = layer(residual, update, rotation, layer_cache, meta)
        return self.norm(residual, update)  # type: ignore[no-any-return]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.head.logits(hidden)

    def weights(self) -> Weights:
        weights = self.embedding.weights("model.embed_tokens") | self.norm.weights("model.norm")
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, LlamaLayer)
            weights |= layer.weights(f"model.layers.{number}.")
        return weights if self.is_tied else weights | self.head.weights("lm_head")
