"""Layer norm of the rows of a batch, as one link of a chain of launches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, update: Tensor | None = None) -> Tensor:
    """Norm of the rows of `x` [rows, size], times `weight` [size] plus `bias` [size]; computed in float32.

    With `update` [size], `x += update` happens afterwards, in place.
    """
    if x.is_cuda:
        return layer_norm_triton(x, weight, bias, eps, update)
    return layer_norm_reference(x, weight, bias, eps, update)


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, update: Tensor | None = None
) -> Tensor:
    """The same in torch."""
    normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    if update is not None:
        x += update
    return normed


def layer_norm_triton(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, update: Tensor | None = None
) -> Tensor:
    """The same in one launch, a program per row; everything is dense."""
    rows, size = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _layer_norm_kernel[(rows,)](
        x,
        weight,
        bias,
        bias if update is None else update,
        out,
        eps,
        UPDATE=update is not None,
        SIZE=size,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
        **pdl_options(x),
    )
    return out


@triton.jit
def _layer_norm_kernel(
    x_ptr,  # [rows, SIZE]
    weight_ptr,  # [SIZE]
    bias_ptr,  # [SIZE]
    update_ptr,  # [SIZE]
    out_ptr,  # [rows, SIZE]
    eps,
    UPDATE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    allow_next(PDL)
    wait_previous(PDL)
    place = tl.program_id(0).to(tl.int64) * SIZE + column
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, 0) / SIZE, 0.0)
    deviation = tl.rsqrt(tl.sum(centred * centred, 0) / SIZE + eps)
    if UPDATE:
        updated = x + tl.load(update_ptr + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + place, updated.to(x_ptr.dtype.element_ty), mask=inside)
    out = centred * deviation * weight + bias
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)
