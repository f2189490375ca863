"""`batch_invariant` on GPUs: models by kernels that sum in a fixed order, whatever else is in the step.

The same layers as in `fused.py`, each operation by one kernel for every kind of step: a row of a product, a
token's attention and a row of a norm depend on nothing else in the step. Which tiling a kernel takes may
depend on the step's size, as its result does not; `invariance.py` checks that on the GPU at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ipc.errors import ConfigError
from ..kernels import fixed_order_attention as attention
from ..kernels import fixed_order_linear as linear
from ..kernels.fixed_order_attention import fixed_order_attention
from ..kernels.fixed_order_linear import fixed_order_linear
from ..kernels.kv_write import finish_heads
from ..kernels.layer_norm import layer_norm
from ..kernels.rms_norm import rms_norm
from ..kernels.silu_mul import silu_mul
from ..kernels.slot_table import StepInputs
from ..kernels.vector_linear import Activation
from .fused import Heads, Packed
from .layers import ColumnLinear, LayerNorm, Linear, RowLinear, VocabTable
from .models.causal_lm import CausalLM, LayerCache
from .models.llama import Llama, LlamaLayer
from .models.opt import NORM_EPS, OPT, POSITION_OFFSET, OPTLayer
from .models.qwen3 import Qwen3Attention

_WIDEST_FLOAT32 = 128
"""Queries, keys and values of heads that are wider do not fit into shared memory."""

_Attend: TypeAlias = Callable[[int, Tensor, Heads], Tensor]
"""As `fused.Attend`."""


class FixedOrder:
    """A model's steps on a GPU, with the methods of `fused.Fused`. For one rank."""

    share = None

    def __init__(
        self,
        model: CausalLM,
        caches: Sequence[LayerCache],
        block_tables: Tensor,
        num_heads: int,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        """For up to `max_rows` decoding rows and sequences of up to `max_tokens`."""
        if not isinstance(model, Llama | OPT):
            message = f"batch_invariant=True is not supported with {type(model).__name__} on GPUs"
            raise ConfigError(message, parameter="batch_invariant", value=True, limit=False)
        if model.head_dim > _WIDEST_FLOAT32 and caches[0][0].dtype == torch.float32:
            message = (
                f"batch_invariant=True in float32 needs heads of at most {_WIDEST_FLOAT32} on GPUs; "
                f"this model's are of {model.head_dim}"
            )
            limit = f"dtype='bfloat16', or heads of <= {_WIDEST_FLOAT32}"
            raise ConfigError(message, parameter="batch_invariant", value=True, limit=limit)
        self._model, self._caches, self._tables = model, caches, block_tables
        _, _, kv_heads, self._head_dim = caches[0][0].shape
        self._num_heads, self.tile_tokens = num_heads, attention.tile_tokens(num_heads, kv_heads)
        device = block_tables.device
        self._products = linear.Workspace.empty(device)
        self._chunks = attention.Workspace.empty(
            num_heads, kv_heads, self._head_dim, max_rows, max_tokens, device
        )
        self._starts = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._each = torch.stack((self._starts, torch.zeros_like(self._starts)), dim=1)

    def gather(self, logits: Tensor) -> Tensor:
        """One rank has the logits of all tokens."""
        return logits

    def decode(self, inputs: StepInputs, slots: Tensor) -> Tensor:
        """Logits [rows, vocab], in the model's dtype, of rows of one token each; `slots`: int32 [rows]."""
        rows = len(slots)
        step = Packed(inputs, slots, self._starts[: rows + 1], rows, self._each[:0])
        return self._logits(self._run(step))

    def packed(self, step: Packed, last: Tensor) -> Tensor | None:
        """Logits [n, vocab] of the tokens `last`, int32 [n]; None when there are none."""
        hidden = self._run(step)
        return self._logits(hidden.index_select(0, last)) if len(last) else None

    def _run(self, step: Packed) -> Tensor:
        def attend(layer: int, qkv: Tensor, heads: Heads) -> Tensor:
            return self._attend(step, layer, qkv, heads)

        run = self._llama if isinstance(self._model, Llama) else self._opt
        return run(step.inputs, attend)

    def _attend(self, step: Packed, layer: int, qkv: Tensor, heads: Heads) -> Tensor:
        each = qkv.view(len(qkv), -1, self._head_dim)
        finish_heads(
            each,
            *self._caches[layer],
            step.inputs.slot_mapping,
            rotation=heads.rotation,
            positions=step.inputs.positions,
            q_norm=heads.q_norm,
            k_norm=heads.k_norm,
            eps=heads.eps,
            late=heads.late,
            bias=heads.bias,
        )
        out = torch.empty(len(qkv), self._num_heads * self._head_dim, dtype=qkv.dtype, device=qkv.device)
        parts = ((self._each[: step.num_decodes], 1), (step.tiles, self.tile_tokens))
        for tiles, tokens in parts:
            if len(tiles):
                fixed_order_attention(
                    each[:, : self._num_heads],
                    *self._caches[layer],
                    block_tables=self._tables,
                    table_rows=step.slots,
                    query_start=step.query_start,
                    seq_lens=step.inputs.seq_lens,
                    tiles=tiles,
                    tile_tokens=tokens,
                    scale=heads.scale,
                    workspace=self._chunks,
                    out=out,
                )
        return out

    def _linear(
        self,
        layer: ColumnLinear | RowLinear | Linear | VocabTable,
        x: Tensor,
        *,
        bias: Tensor | None = None,
        activation: Activation = "none",
        residual: Tensor | None = None,
    ) -> Tensor:
        return fixed_order_linear(
            x, layer.weight, bias, workspace=self._products, activation=activation, residual=residual
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        model = self._model
        if isinstance(model, Llama):
            hidden = rms_norm(hidden, model.norm.weight, model.norm.eps)
        else:
            assert isinstance(model, OPT)
            if model.norm is not None:
                hidden = _layer_norm(model.norm, hidden)
            if model.project_out is not None:
                hidden = self._linear(model.project_out, hidden)
        return model.head.gather(self._linear(model.head, hidden))

    # --- Llama, Mistral, Qwen2, Qwen3 ----------------------------------------------------------------

    def _llama(self, inputs: StepInputs, attend: _Attend) -> Tensor:
        model = self._model
        assert isinstance(model, Llama)
        residual = model.embedding.embed(inputs.input_ids)
        late = residual if model.norms_are_folded else None
        for number, layer in enumerate(model.layers):
            assert isinstance(layer, LlamaLayer)
            block, eps, mlp = layer.attention, layer.input_norm.eps, layer.mlp
            bias = block.qkv_proj.bias
            heads = Heads(block.scale, model.rotation, eps=eps)
            if isinstance(block, Qwen3Attention):
                heads = replace(heads, q_norm=block.q_norm.weight, k_norm=block.k_norm.weight)
            if late is None:
                normed = rms_norm(residual, layer.input_norm.weight, eps)
                qkv = self._linear(block.qkv_proj, normed, bias=bias)
            else:
                heads = replace(heads, late=late, bias=bias)
                qkv = self._linear(block.qkv_proj, residual)
            attended = attend(number, qkv, heads)
            self._linear(block.o_proj, attended, bias=block.o_proj.bias, residual=residual)
            normed = residual if late is not None else rms_norm(residual, layer.mlp_norm.weight, eps)
            gate_up = self._linear(mlp.gate_up_proj, normed, bias=mlp.gate_up_proj.bias)
            gated = silu_mul(gate_up, late, layer.mlp_norm.eps)
            self._linear(mlp.down_proj, gated, bias=mlp.down_proj.bias, residual=residual)
        return residual

    # --- OPT -----------------------------------------------------------------------------------------

    def _opt(self, inputs: StepInputs, attend: _Attend) -> Tensor:
        model = self._model
        assert isinstance(model, OPT)
        residual = model.embedding.embed(inputs.input_ids)
        if model.project_in is not None:
            residual = self._linear(model.project_in, residual)
        residual += F.embedding(inputs.positions + POSITION_OFFSET, model.positions.weight)
        for number, layer in enumerate(model.layers):
            assert isinstance(layer, OPTLayer)
            block, before = layer.attention, layer.norm_before
            x = _layer_norm(layer.attention_norm, residual) if before else residual
            qkv = self._linear(block.qkv_proj, x, bias=block.qkv_proj.bias)
            attended = attend(number, qkv, Heads(block.head_dim**-0.5))
            self._linear(block.out_proj, attended, bias=block.out_proj.bias, residual=residual)
            if not before:
                residual = _layer_norm(layer.attention_norm, residual)
            x = _layer_norm(layer.ffn_norm, residual) if before else residual
            x = self._linear(layer.fc1, x, bias=layer.fc1.bias, activation=model.activation)
            self._linear(layer.fc2, x, bias=layer.fc2.bias, residual=residual)
            if not before:
                residual = _layer_norm(layer.ffn_norm, residual)
        return residual


def _layer_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, norm.weight, norm.bias, NORM_EPS)
