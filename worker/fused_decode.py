"""Decode steps of one token a row, by kernels that each do a layer's operation with what surrounds it.

The same computation as the models' `forward`, in fewer launches: a handful a layer, which is what a small
batch costs. Knows the models' parts; a model that it does not know or that is split over ranks is not fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from ..kernels.decode_attention import DecodePlan, decode_attention, plan_decode
from ..kernels.fused_linear import linear_add, norm_gate_up_silu, norm_linear
from ..kernels.slot_table import StepInputs
from .models.causal_lm import CausalLM, LayerCache
from .models.llama import Llama, LlamaLayer
from .models.opt import NORM_EPS, OPT, POSITION_OFFSET, OPTLayer
from .models.qwen3 import Qwen3Attention

FusedDecode: TypeAlias = Callable[[StepInputs, Tensor, Tensor], Tensor]
"""(inputs, slots int32 [rows], block_tables) to logits [rows, vocab] in the model's dtype."""


def fused_decode(
    model: CausalLM, caches: Sequence[LayerCache], num_heads: int, max_rows: int
) -> FusedDecode | None:
    """`model`'s decode step on the GPU, for up to `max_rows` rows; None if it has to run its `forward`."""
    device = caches[0][0].device
    if device.type != "cuda":
        return None
    plan = DecodePlan.empty(max_rows, num_heads, model.num_kv_heads, model.head_dim, device)
    if isinstance(model, Llama) and _is_plain_llama(model):
        return lambda inputs, slots, tables: _llama(model, caches, plan, inputs, slots, tables)
    if isinstance(model, OPT) and _is_plain_opt(model):
        return lambda inputs, slots, tables: _opt(model, caches, plan, inputs, slots, tables)
    return None


def _is_plain_llama(model: Llama) -> bool:
    first = model.layers[0]
    assert isinstance(first, LlamaLayer)
    return model.embedding.tp.size == 1 and first.mlp.gate_up_proj.bias is None


def _is_plain_opt(model: OPT) -> bool:
    first = model.layers[0]
    assert isinstance(first, OPTLayer)
    return model.embedding.tp.size == 1 and first.norm_before and model.project_in is None


def _llama(
    model: Llama,
    caches: Sequence[LayerCache],
    plan: DecodePlan,
    inputs: StepInputs,
    slots: Tensor,
    block_tables: Tensor,
) -> Tensor:
    plan_decode(plan, inputs.seq_lens, slots)
    residual = model.embedding.embed(inputs.input_ids)
    for number, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
        assert isinstance(layer, LlamaLayer)
        attention, mlp = layer.attention, layer.mlp
        norms = (attention.q_norm, attention.k_norm) if isinstance(attention, Qwen3Attention) else None
        qkv = norm_linear(
            residual,
            attention.qkv_proj.weight,
            attention.qkv_proj.bias,
            norm_weight=layer.input_norm.weight,
            eps=layer.input_norm.eps,
        )
        attended = decode_attention(
            qkv,
            *cache,
            block_tables,
            plan,
            scale=attention.scale,
            rotation=model.rotation,
            q_norm=norms[0].weight if norms else None,
            k_norm=norms[1].weight if norms else None,
            eps=layer.input_norm.eps,
            reads_ahead=number > 0,
        )
        linear_add(attended, attention.o_proj.weight, attention.o_proj.bias, residual)
        gated = norm_gate_up_silu(
            residual, layer.mlp_norm.weight, mlp.gate_up_proj.weight, layer.mlp_norm.eps
        )
        linear_add(gated, mlp.down_proj.weight, None, residual)
    return norm_linear(residual, model.head.weight, norm_weight=model.norm.weight, eps=model.norm.eps)


def _opt(
    model: OPT,
    caches: Sequence[LayerCache],
    plan: DecodePlan,
    inputs: StepInputs,
    slots: Tensor,
    block_tables: Tensor,
) -> Tensor:
    plan_decode(plan, inputs.seq_lens, slots)
    residual = model.embedding.embed(inputs.input_ids)
    residual += F.embedding(inputs.positions + POSITION_OFFSET, model.positions.weight)
    for number, (layer, cache) in enumerate(zip(model.layers, caches, strict=True)):
        assert isinstance(layer, OPTLayer)
        attention = layer.attention
        qkv = norm_linear(
            residual,
            attention.qkv_proj.weight,
            attention.qkv_proj.bias,
            norm_weight=layer.attention_norm.weight,
            norm_bias=layer.attention_norm.bias,
            eps=NORM_EPS,
        )
        attended = decode_attention(
            qkv, *cache, block_tables, plan, scale=attention.head_dim**-0.5, reads_ahead=number > 0
        )
        linear_add(attended, attention.out_proj.weight, attention.out_proj.bias, residual)
        hidden = norm_linear(
            residual,
            layer.fc1.weight,
            layer.fc1.bias,
            norm_weight=layer.ffn_norm.weight,
            norm_bias=layer.ffn_norm.bias,
            eps=NORM_EPS,
            relu=True,
        )
        linear_add(hidden, layer.fc2.weight, layer.fc2.bias, residual)
    assert model.norm is not None
    return norm_linear(
        residual,
        model.head.weight,
        norm_weight=model.norm.weight,
        norm_bias=model.norm.bias,
        eps=NORM_EPS,
    )
