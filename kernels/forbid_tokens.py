"""Forbid tokens row by row, as masks of one bit a token say that came from the host."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous

_BLOCK = 4096


def forbid_tokens(logits: Tensor, masks: Tensor, index: Tensor, first: int = 0) -> None:
    """Set to -inf, in place, the logits of tokens whose bit is not set.

    Args:
        logits: [rows, columns], any float dtype, columns adjacent.
        masks: int32 [n, words]: bit i of word j is token 32 * j + i.
        index: int32 [rows]: which mask is a row's; -1: none, all tokens may come.
        first: the token of column 0. Tokens beyond the masks are forbidden.
    """
    forbid = forbid_tokens_triton if logits.is_cuda else forbid_tokens_reference
    forbid(logits, masks, index, first)


def forbid_tokens_reference(logits: Tensor, masks: Tensor, index: Tensor, first: int = 0) -> None:
    """`forbid_tokens` in torch."""
    token = first + torch.arange(logits.shape[1], device=logits.device)
    inside = token < 32 * masks.shape[1]
    words = masks[:, (token // 32).clamp(max=masks.shape[1] - 1)]
    forbidden = ((words >> (token % 32)) & 1 == 0) | ~inside
    rows = (index >= 0).nonzero().squeeze(1)
    logits[rows] = logits[rows].masked_fill_(forbidden[index[rows].long()], -torch.inf)


def forbid_tokens_triton(logits: Tensor, masks: Tensor, index: Tensor, first: int = 0) -> None:
    """`forbid_tokens` in one launch that writes what it forbids and reads no logits."""
    rows, columns = logits.shape
    assert logits.stride(1) == 1
    assert masks.stride(1) == 1
    _forbid_kernel[triton.cdiv(columns, _BLOCK), rows](
        logits,
        masks,
        index,
        columns,
        masks.shape[1],
        logits.stride(0),
        masks.stride(0),
        first,
        BLOCK=_BLOCK,
        **pdl_options(logits),
    )


@triton.jit
def _forbid_kernel(
    logits_ptr,
    masks_ptr,
    index_ptr,
    columns,
    words,
    row_stride,
    mask_stride,
    first_token,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = first_token + column
    allow_next(PDL)
    wait_previous(PDL)
    mask = tl.load(index_ptr + row).to(tl.int64)
    if mask >= 0:
        word = tl.load(masks_ptr + mask * mask_stride + token // 32, mask=token // 32 < words, other=0)
        forbidden = (word >> (token % 32)) & 1 == 0
        nothing = tl.full([BLOCK], -float("inf"), logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + row * row_stride + column, nothing, mask=forbidden & (column < columns))
