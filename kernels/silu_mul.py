"""The gate of a gated feed-forward layer: silu(gate) * up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous
from .rms_norm import late_scale, row_scales

_BLOCK = 1024


def silu_mul(
    gate_up: Tensor, late: Tensor | None = None, eps: float = 0.0, squares: Tensor | None = None
) -> Tensor:
    """[tokens, 2 * size] (gate, then up) to [tokens, size].

    `late`: [tokens, in_features], the input of the projections that `gate_up` is, whose RMS norm is still to
    be applied (its weight is in the projections). `squares`: float32 [parts, tokens], in all the sums of the
    squares of `late`'s rows, if known.
    """
    if gate_up.is_cuda:
        return silu_mul_triton(gate_up, late, eps, squares)
    return silu_mul_reference(gate_up, late, eps)


def silu_mul_reference(gate_up: Tensor, late: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """The same in torch."""
    if late is not None:
        gate_up = (gate_up * row_scales(late.to(torch.float32), eps)).to(gate_up.dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


# --- Triton ------------------------------------------------------------------------------------------


def silu_mul_triton(
    gate_up: Tensor, late: Tensor | None = None, eps: float = 0.0, squares: Tensor | None = None
) -> Tensor:
    """The same in one launch; `gate_up` and `late` are dense. The gate is not rounded before the product."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    # Each program of a late norm reads a whole row of its input: few large ones.
    reads_rows = late is not None and squares is None
    block, warps = (4096, 16) if reads_rows and size > 4096 else (_BLOCK, 4)
    _silu_mul_kernel[tokens, triton.cdiv(size, block)](
        gate_up,
        gate_up if late is None else late,
        gate_up if squares is None else squares,
        out,
        tokens,
        size,
        eps,
        LATE=0 if late is None else late.shape[1],
        PARTS=0 if squares is None else len(squares),
        BLOCK=block,
        num_warps=warps,
        **pdl_options(gate_up),
    )
    return out


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _silu_mul_kernel(
    gate_up_ptr,  # [tokens, 2 * size]
    late_ptr,  # [tokens, LATE]
    squares_ptr,  # float32 [PARTS, tokens]
    out_ptr,  # [tokens, size]
    tokens,
    size,
    eps,
    LATE: tl.constexpr,
    PARTS: tl.constexpr,  # 0: no squares
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    allow_next(PDL)
    wait_previous(PDL)
    gate = tl.load(gate_up_ptr + token * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + token * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    if LATE:
        scale = late_scale(late_ptr, squares_ptr, token, tokens, eps, LATE, PARTS)
        gate *= scale
        up *= scale
    tl.store(out_ptr + token * size + column, gate * tl.sigmoid(gate) * up, mask=inside)
