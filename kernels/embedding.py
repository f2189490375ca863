"""Rows of a table by number: the embedding of a decode step's tokens, as one link of a chain of launches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous


def embed(ids: Tensor, table: Tensor, first: int = 0) -> Tensor:
    """Row `id - first` of `table` for each id, zeros for those that it has not.

    Integer [tokens] and [rows, size] to [tokens, size].
    """
    if ids.is_cuda:
        return embed_triton(ids, table, first)
    return embed_reference(ids, table, first)


def embed_reference(ids: Tensor, table: Tensor, first: int = 0) -> Tensor:
    """`embed` in torch."""
    foreign = (ids < first) | (ids >= first + len(table))
    return F.embedding((ids - first).masked_fill_(foreign, 0), table).masked_fill_(foreign[:, None], 0)


def embed_triton(ids: Tensor, table: Tensor, first: int = 0) -> Tensor:
    """`embed` in one launch. The table is contiguous."""
    rows, size = table.shape
    out = torch.empty(len(ids), size, dtype=table.dtype, device=ids.device)
    _embed_kernel[(len(ids),)](
        ids, table, out, first, rows, SIZE=size, BLOCK=triton.next_power_of_2(size), **pdl_options(ids)
    )
    return out


@triton.jit
def _embed_kernel(
    ids_ptr,
    table_ptr,
    out_ptr,
    first,
    rows,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    allow_next(PDL)
    wait_previous(PDL)
    row = tl.load(ids_ptr + token).to(tl.int64) - first
    known = tl.where((row >= 0) & (row < rows), SIZE, 0)
    vector = tl.load(table_ptr + row * SIZE + column, mask=column < known, other=0.0)
    tl.store(out_ptr + token * SIZE + column, vector, mask=column < SIZE)
