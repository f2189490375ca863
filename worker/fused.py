"""Models by kernels that do each of a layer's operations together with what surrounds it.

The same computation as the models' `forward`, in fewer launches and fewer passes over memory. Knows the parts
of models and which kernel suits which rows; a model that it does not know is not fused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import small_batch_linear
from ..kernels.decode_attention import decode_attention
from ..kernels.decode_plan import DecodePlan, plan_decode
from ..kernels.draw_tokens import Share
from ..kernels.fused_linear import (
    late_gate_up_silu,
    linear_add,
    linear_add_squares,
    norm_gate_up_silu,
    norm_linear,
)
from ..kernels.kv_write import finish_heads
from ..kernels.layer_norm import layer_norm
from ..kernels.paged_prefill import paged_prefill, tile_tokens
from ..kernels.prompt_attention import prompt_attention, prompt_cache
from ..kernels.rms_norm import rms_norm
from ..kernels.silu_mul import silu_mul
from ..kernels.slot_table import StepInputs
from ..kernels.vector_linear import Activation
from .layers import ColumnLinear, LayerNorm, RMSNorm, RowLinear, VocabTable
from .models.causal_lm import CausalLM, LayerCache
from .models.llama import Llama, LlamaLayer
from .models.opt import NORM_EPS, OPT, POSITION_OFFSET, OPTLayer
from .models.qwen3 import Qwen3Attention
from .parallel import TensorParallel


@dataclass(frozen=True, slots=True)
class Heads:
    """What a layer does to its heads before they attend."""

    scale: float
    rotation: Tensor | None = None
    """[positions, 3, head_dim / 2]"""
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0
    late: Tensor | None = None
    """The input of the projections if its norm is still to be applied (see `fold_norms`), and then `bias`."""
    squares: Tensor | None = None
    """Of `late`'s rows, if known: float32 [parts, tokens], in all their sums."""
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Packed:
    """The rows of a packed step. The first `num_decodes` have one token each, and read nothing that another
    row of the step writes.
    """

    inputs: StepInputs
    slots: Tensor
    """int32 [rows]"""
    query_start: Tensor
    """int32 [rows + 1]"""
    num_decodes: int
    tiles: Tensor
    """int32 [tiles, 2], of the rows that are not among the first `num_decodes`: the tile's row, and its first
    token in it, a multiple of the model's `tile_tokens`. Rows of -1 come last and are no tiles."""


HALVED_FROM = 8192
"""Tokens from which a step over several ranks is computed in halves: those take twice as long to launch. Half
as many where sums are copies, which take no processors from the products beside them, as NCCL's do.
"""

Attend: TypeAlias = Callable[[int, Tensor, Heads], Tensor]
"""(layer, qkv [tokens, (heads + 2 * kv_heads) * head_dim], what to do to the heads) to
[tokens, heads * head_dim]; stores the keys and values."""
_Run: TypeAlias = Callable[[StepInputs, Attend, bool], Tensor]
"""The bool: `attend` takes heads of a late norm."""
_Logits: TypeAlias = Callable[[Tensor], Tensor]


class Fused:
    """A model's steps on a GPU."""

    def __init__(
        self,
        run: _Run,
        logits: _Logits,
        head: VocabTable,
        caches: Sequence[LayerCache],
        block_tables: Tensor,
        num_heads: int,
        max_rows: int,
    ) -> None:
        self._run, self._logits, self._head = run, logits, head
        self._caches, self._tables = caches, block_tables
        _, _, kv_heads, head_dim = caches[0][0].shape
        self._head_dim, self._num_heads = head_dim, num_heads
        self._prompt_caches = [prompt_cache(*cache) for cache in caches]
        found = self._prompt_caches[0]
        head_bytes = head_dim * caches[0][0].element_size()
        self.tile_tokens = (
            tile_tokens(num_heads, kv_heads, head_bytes) if found is None else found.tuning.tile_tokens
        )
        """Query tokens of one tile of `Packed.tiles`."""
        self._plan = DecodePlan.empty(max_rows, num_heads, kv_heads, head_dim, block_tables.device)

    @property
    def share(self) -> Share | None:
        """Which tokens the logits of `decode` and `packed` are of; None: all."""
        head = self._head
        return None if head.tp.peers is None else head.tp.peers.share(head.start, head.stop - head.start)

    def gather(self, logits: Tensor) -> Tensor:
        """The logits of all tokens from those of this rank's `share`. Not for CUDA graphs."""
        return logits if self.share is None else self._head.gather(logits)

    def decode(self, inputs: StepInputs, slots: Tensor) -> Tensor:
        """Logits [rows, vocab], in the model's dtype, of rows of one token each; `slots`: int32 [rows]."""
        plan_decode(self._plan, inputs.seq_lens, slots)
        return self._logits(self._run(inputs, self._attend_decodes, True))

    def packed(self, step: Packed, last: Tensor) -> Tensor | None:
        """Logits [n, vocab] of the tokens `last`, int32 [n]; None when there are none."""
        if step.num_decodes:
            plan_decode(self._plan, step.inputs.seq_lens[: step.num_decodes], step.slots[: step.num_decodes])
        hidden = self._run(
            step.inputs, lambda layer, qkv, heads: self._attend(step, layer, qkv, heads), False
        )
        return self._logits(hidden.index_select(0, last)) if len(last) else None

    def _attend_decodes(self, layer: int, qkv: Tensor, heads: Heads, out: Tensor | None = None) -> Tensor:
        return decode_attention(
            qkv,
            *self._caches[layer],
            self._tables,
            self._plan,
            scale=heads.scale,
            rotation=heads.rotation,
            q_norm=heads.q_norm,
            k_norm=heads.k_norm,
            eps=heads.eps,
            late=heads.late,
            squares=heads.squares,
            bias=heads.bias,
            reads_ahead=layer > 0 and out is None,
            out=out,
        )

    def _attend(self, step: Packed, layer: int, qkv: Tensor, heads: Heads) -> Tensor:
        decodes, size = step.num_decodes, self._num_heads * self._head_dim
        out = torch.empty(len(qkv), size, dtype=qkv.dtype, device=qkv.device)
        if decodes:
            self._attend_decodes(layer, qkv[:decodes], heads, out[:decodes])
        each = qkv.view(len(qkv), -1, self._head_dim)
        if len(qkv) > decodes:
            finish_heads(
                each[decodes:],
                *self._caches[layer],
                step.inputs.slot_mapping[decodes:],
                rotation=heads.rotation,
                positions=step.inputs.positions[decodes:],
                q_norm=heads.q_norm,
                k_norm=heads.k_norm,
                eps=heads.eps,
            )
        if len(step.tiles):
            self._attend_prompts(step, layer, each, heads.scale, out)
        return out

    def _attend_prompts(self, step: Packed, layer: int, each: Tensor, scale: float, out: Tensor) -> None:
        rows: dict[str, Any] = {
            "block_tables": self._tables,
            "table_rows": step.slots,
            "query_start": step.query_start,
            "seq_lens": step.inputs.seq_lens,
            "tiles": step.tiles,
        }
        cache = self._prompt_caches[layer]
        if cache is None:
            q = each[:, : self._num_heads]
            paged_prefill(q, *self._caches[layer], **rows, scale=scale, out=out)
        else:
            prompt_attention(each, cache, **rows, scale=scale, out=out)


def fuse(
    model: CausalLM, caches: Sequence[LayerCache], block_tables: Tensor, num_heads: int, max_rows: int
) -> Fused | None:
    """`model`'s steps, with up to `max_rows` decoding rows; None if it must run its `forward`."""
    rest = caches, block_tables, num_heads, max_rows
    if isinstance(model, Llama) and _is_plain_llama(model):
        return Fused(
            lambda i, a, late: _llama(model, i, a, late), lambda h: _llama_logits(model, h), model.head, *rest
        )
    if isinstance(model, OPT) and _is_plain_opt(model):
        return Fused(lambda i, a, _: _opt(model, i, a), lambda h: _opt_logits(model, h), model.head, *rest)
    return None


def fold_norms(model: CausalLM) -> None:
    """Let `model`'s steps of many rows do without kernels for norms. After the weights are loaded.

    Not for float16: a product of what has not been normed may leave its range.
    """
    if isinstance(model, Llama) and _is_plain_llama(model) and model.norm.weight.dtype == torch.bfloat16:
        model.fold_norms()


class _Part:
    """Some of a step's tokens, and what is still being added to them."""

    def __init__(self, residual: Tensor) -> None:
        self._residual = residual
        self._finish: Callable[[], tuple[Tensor, ...]] = tuple
        self.squares: Tensor | None = None
        """Of the settled residual's rows, if known: float32 [parts, tokens], in all their sums."""

    def settled(self) -> Tensor:
        """The residual stream [tokens, hidden_size] with everything added."""
        if updates := self._updates():
            self._residual += updates[0] if len(updates) == 1 else updates[0] + updates[1]
        return self._residual

    def normed(self, norm: RMSNorm) -> Tensor | None:
        """`norm` of what `settled` returns, if what is still to be added can be added on the way."""
        updates = self._updates()
        return rms_norm(self._residual, norm.weight, norm.eps, *updates) if updates else None

    def _updates(self) -> tuple[Tensor, ...]:
        finish, self._finish = self._finish, tuple
        return finish()

    def add(self, linear: RowLinear, x: Tensor, late: bool = False) -> None:
        """`+= linear(x)`, summed over the ranks. `late`: a late norm follows."""
        tp, residual = linear.tp, self.settled()
        self.squares = None
        if tp.size == 1 and late:
            self.squares = linear_add_squares(x, linear.weight, linear.bias, residual)
        elif tp.size == 1:
            linear_add(x, linear.weight, linear.bias, residual)
        else:
            partial = norm_linear(x, linear.weight, linear.bias if tp.rank == 0 else None)
            self.squares = tp.room_for_squares(partial) if late else None
            self._finish = tp.add_all_reduced(partial, residual, self.squares)


def _parts(residual: Tensor, tp: TensorParallel) -> list[_Part]:
    """All tokens, or two halves: one half's sums are then under way while the other half is computed."""
    least = HALVED_FROM if tp.copies is None else HALVED_FROM // 2
    halves = 2 if tp.size > 1 and len(residual) >= least else 1
    return [_Part(rows) for rows in residual.chunk(halves)]


def _vocab_logits(head: VocabTable, logits: Tensor) -> Tensor:
    """Without mailboxes a draw must see all tokens."""
    return logits if head.tp.peers is not None else head.gather(logits)


# --- Llama, Mistral, Qwen2, Qwen3 --------------------------------------------------------------------


def _is_plain_llama(model: Llama) -> bool:
    first = model.layers[0]
    assert isinstance(first, LlamaLayer)
    return first.mlp.gate_up_proj.bias is None


def _llama(model: Llama, inputs: StepInputs, attend: Attend, late: bool) -> Tensor:
    residual = model.embedding.embed(inputs.input_ids)
    late = late and model.norms_are_folded and len(residual) > small_batch_linear.MAX_TOKENS
    parts = _parts(residual, model.embedding.tp)
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, LlamaLayer)
        attention, eps = layer.attention, layer.input_norm.eps
        heads = Heads(attention.scale, model.rotation, eps=eps)
        if isinstance(attention, Qwen3Attention):
            heads = replace(heads, q_norm=attention.q_norm.weight, k_norm=attention.k_norm.weight)
        if late:
            squares = parts[0].squares if len(parts) == 1 else None
            heads = replace(heads, late=residual, squares=squares, bias=attention.qkv_proj.bias)
        qkv = [_project(layer, part, late, model.norms_are_folded) for part in parts]
        attended = attend(number, qkv[0] if len(qkv) == 1 else torch.cat(qkv), heads)
        for part, rows in zip(parts, attended.chunk(len(parts)), strict=True):
            part.add(attention.o_proj, rows, late)
        for part in parts:
            part.add(layer.mlp.down_proj, _gate(layer, part, late, model.norms_are_folded), late)
    for part in parts:
        part.settled()
    return residual


def _project(layer: LlamaLayer, part: _Part, late: bool, folded: bool) -> Tensor:
    """Queries, keys and values."""
    linear, norm = layer.attention.qkv_proj, layer.input_norm
    if not late and (normed := part.normed(norm)) is not None:
        return norm_linear(normed, linear.weight, linear.bias)
    residual = part.settled()
    if late:
        return norm_linear(residual, linear.weight, attention_follows=True)
    return norm_linear(
        residual,
        linear.weight,
        linear.bias,
        norm_weight=norm.weight,
        eps=norm.eps,
        norm_is_folded=folded,
    )


def _gate(layer: LlamaLayer, part: _Part, late: bool, folded: bool) -> Tensor:
    """The input of the down projection."""
    weight, norm = layer.mlp.gate_up_proj.weight, layer.mlp_norm
    if not late and (normed := part.normed(norm)) is not None:
        return silu_mul(norm_linear(normed, weight))
    residual = part.settled()
    if late:
        return late_gate_up_silu(residual, weight, norm.eps, part.squares)
    return norm_gate_up_silu(residual, norm.weight, weight, norm.eps, folded)


def _llama_logits(model: Llama, hidden: Tensor) -> Tensor:
    logits = norm_linear(hidden, model.head.weight, norm_weight=model.norm.weight, eps=model.norm.eps)
    return _vocab_logits(model.head, logits)


# --- OPT ---------------------------------------------------------------------------------------------


def _is_plain_opt(model: OPT) -> bool:
    first = model.layers[0]
    assert isinstance(first, OPTLayer)
    return first.norm_before and model.norm is not None and model.project_in is None


def _opt(model: OPT, inputs: StepInputs, attend: Attend) -> Tensor:
    residual = model.embedding.embed(inputs.input_ids)
    residual += F.embedding(inputs.positions + POSITION_OFFSET, model.positions.weight)
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, OPTLayer)
        attention = layer.attention
        qkv = _norm_linear(layer.attention_norm, attention.qkv_proj, residual, attention.out_proj)
        attended = attend(number, qkv, Heads(attention.head_dim**-0.5))
        _add_unbiased(attention.out_proj, attended, residual)
        hidden = _norm_linear(layer.ffn_norm, layer.fc1, residual, layer.fc2, model.activation)
        _add_unbiased(layer.fc2, hidden, residual)
    return residual


def _is_wide(linear: RowLinear, residual: Tensor) -> bool:
    """Norms and biases of many rows have a kernel of their own: one for both."""
    return linear.tp.size == 1 and len(residual) > small_batch_linear.MAX_TOKENS


def _norm_linear(
    norm: LayerNorm,
    linear: ColumnLinear,
    residual: Tensor,
    following: RowLinear,
    activation: Activation = "none",
) -> Tensor:
    """`linear(norm(residual))`; of many rows also `residual += following.bias`."""
    if _is_wide(following, residual):
        normed = layer_norm(residual, norm.weight, norm.bias, NORM_EPS, following.bias)
        return norm_linear(normed, linear.weight, linear.bias, activation=activation)
    return norm_linear(
        residual,
        linear.weight,
        linear.bias,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
        eps=NORM_EPS,
        activation=activation,
    )


def _add_unbiased(linear: RowLinear, x: Tensor, residual: Tensor) -> None:
    """`residual += linear(x)`, summed over the ranks, less the bias that `_norm_linear` has added already."""
    if _is_wide(linear, residual):
        linear_add(x, linear.weight, None, residual)
    else:
        whole = _Part(residual)
        whole.add(linear, x)
        whole.settled()


def _opt_logits(model: OPT, hidden: Tensor) -> Tensor:
    assert model.norm is not None
    logits = norm_linear(
        hidden,
        model.head.weight,
        norm_weight=model.norm.weight,
        norm_bias=model.norm.bias,
        eps=NORM_EPS,
    )
    return _vocab_logits(model.head, logits)
