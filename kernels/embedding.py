"""Rows of a table by number: the embedding of a decode step's tokens, as one link of a chain of launches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .jit import tl, triton
from .pdl import allow_next, pdl_options, wait_previous


def embed(ids: Tensor, table: Tensor) -> Tensor:
    """`table[ids]`: integer [tokens] and [rows, size] to [tokens, size]."""
    if ids.is_cuda:
        return embed_triton(ids, table)
    return embed_reference(ids, table)


def embed_reference(ids: Tensor, table: Tensor) -> Tensor:
    """`embed` in torch."""
    return F.embedding(ids, table)


def embed_triton(ids: Tensor, table: Tensor) -> Tensor:
    """`embed` in one launch. The table is contiguous."""
    size = table.shape[1]
    out = torch.empty(len(ids), size, dtype=table.dtype, device=ids.device)
    _embed_kernel[(len(ids),)](
        ids, table, out, SIZE=size, BLOCK=triton.next_power_of_2(size), **pdl_options(ids)
    )
    return out


@triton.jit
def _embed_kernel(ids_ptr, table_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    allow_next(PDL)
    wait_previous(PDL)
    row = tl.load(ids_ptr + token).to(tl.int64)
    vector = tl.load(table_ptr + row * SIZE + column, mask=column < SIZE)
    tl.store(out_ptr + token * SIZE + column, vector, mask=column < SIZE)
