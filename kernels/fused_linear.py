"""Linear layers of a decode step with what surrounds them: norm before, gate or residual after.

    norm_linear         y = act(norm(x) W^T + b)
    norm_gate_up_silu   y = silu(norm(x) G^T) * (norm(x) U^T),  W = [G; U]
    late_gate_up_silu   the same, the norm's weight being in W
    linear_add          r = r + x W^T + b, in place
    linear_add_squares  the same, and the squares for a late norm

A decode layer is four of these around an attention. For one token each is one kernel of `vector_linear` that
streams its weights at the memory's speed; for a few, one of `small_batch_linear`; to some hundred, one of
`medium_batch_linear` and the norm's; above, a cuBLAS product and the norm's or gate's kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import medium_batch_linear as medium_batch
from . import small_batch_linear as small_batch
from .layer_norm import layer_norm
from .rms_norm import rms_norm, row_squares
from .silu_mul import silu_mul
from .vector_linear import Activation, vector_linear

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
}

MAX_TOKENS = 1
"""Largest batch of `vector_linear`; the others have limits of their own."""


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = "none",
    norm_is_folded: bool = False,
    attention_follows: bool = False,
) -> Tensor:
    """`act(norm(x) @ weight.T + bias)`.

    Args:
        x: [tokens, in_features]
        weight: [out_features, in_features], contiguous; `bias`: [out_features]
        norm_weight: [in_features]: RMS norm; with `norm_bias`, layer norm; without either, none.
        norm_is_folded: `norm_weight` is all ones.
        attention_follows: leave room on the processors for the first of its programs.
    """
    if x.is_cuda and len(x) <= MAX_TOKENS:
        return vector_linear(
            x,
            weight,
            bias=bias,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            norm_is_folded=norm_is_folded,
            eps=eps,
            activation=activation,
        )
    if activation != "gelu" and small_batch.serves(x, weight):
        if norm_bias is not None:
            x, norm_weight = _norm(x, norm_weight, norm_bias, eps), None
        return small_batch.small_batch_linear(
            x, weight, norm_weight=norm_weight, eps=eps, bias=bias, relu=activation == "relu"
        )
    x = _norm(x, norm_weight, norm_bias, eps)
    tiling = None
    if activation != "gelu":
        tiling = medium_batch.chosen(x, weight, leaves_room=attention_follows)
    if tiling is not None:
        return medium_batch.medium_batch_linear(
            x, weight, tiling=tiling, bias=bias, relu=activation == "relu"
        )
    if activation == "relu" and bias is not None and x.is_cuda:
        return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=False)  # type: ignore[no-any-return]
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def norm_gate_up_silu(
    x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, norm_is_folded: bool = False
) -> Tensor:
    """`silu(gate) * up` of the RMS norm of x [tokens, in_features], as [tokens, size].

    `weight`: [2 * size, in_features], the gate's rows first. `norm_is_folded`: `norm_weight` is all ones.
    """
    if x.is_cuda and len(x) <= MAX_TOKENS:
        return vector_linear(
            x, weight, norm_weight=norm_weight, norm_is_folded=norm_is_folded, eps=eps, gated=True
        )
    if small_batch.serves(x, weight):
        return small_batch.small_batch_linear(x, weight, norm_weight=norm_weight, eps=eps, gated=True)
    x = _norm(x, norm_weight, None, eps)
    tiling = medium_batch.chosen(x, weight, gated=True)
    if tiling is not None:
        return medium_batch.medium_batch_linear(x, weight, tiling=tiling, gated=True)
    return silu_mul(F.linear(x, weight))


def late_gate_up_silu(x: Tensor, weight: Tensor, eps: float, squares: Tensor | None = None) -> Tensor:
    """`norm_gate_up_silu` of many rows, the norm's weight being multiplied into `weight`.

    `squares`, float32 [parts, tokens]: in all the sums of the squares of x's rows, if known.
    """
    tiling = medium_batch.chosen(x, weight, gated=True)
    if tiling is not None:
        squares = row_squares(x) if squares is None else squares
        return medium_batch.medium_batch_linear(
            x, weight, tiling=tiling, squares=squares, eps=eps, gated=True
        )
    return silu_mul(F.linear(x, weight), x, eps, squares)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`residual += x @ weight.T + bias`. x: [tokens, in_features]; residual: [tokens, out_features]."""
    if x.is_cuda and len(x) <= MAX_TOKENS:
        return vector_linear(x, weight, bias=bias, residual=residual)
    if small_batch.serves(x, weight):
        return small_batch.small_batch_linear(x, weight, bias=bias, residual=residual)
    tiling = medium_batch.chosen(x, weight)
    if tiling is not None:
        return medium_batch.medium_batch_linear(x, weight, tiling=tiling, bias=bias, residual=residual)
    if bias is not None:
        residual += bias
    return residual.addmm_(x, weight.t())


def linear_add_squares(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor | None:
    """`linear_add`; returns float32 [parts, tokens], in all the sums of the squares of `residual`'s new rows.

    None where the product does not leave them.
    """
    tiling = medium_batch.chosen(x, weight)
    if tiling is None:
        linear_add(x, weight, bias, residual)
        return None
    parts = medium_batch.parts_of(tiling, len(weight))
    squares = torch.empty(parts, len(x), dtype=torch.float32, device=x.device)
    medium_batch.medium_batch_linear(
        x, weight, tiling=tiling, bias=bias, residual=residual, leave_squares=squares
    )
    return squares


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    if bias is not None:
        return layer_norm(x, weight, bias, eps)
    return rms_norm(x, weight, eps)


# --- References -------------------------------------------------------------------------------------------


def norm_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: Activation = "none",
) -> Tensor:
    """`norm_linear` in torch, in the precision of its arguments."""
    if norm_weight is not None and norm_bias is not None:
        x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
    elif norm_weight is not None:
        x = F.rms_norm(x, norm_weight.shape, norm_weight, eps)
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def norm_gate_up_silu_reference(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm_gate_up_silu` in torch."""
    gate, up = norm_linear_reference(x, weight, norm_weight=norm_weight, eps=eps).chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_add_reference(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`linear_add` in torch; not in place."""
    return residual + F.linear(x, weight, bias)
