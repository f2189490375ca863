"""Kernels that sum in a fixed order: right, and the same bits for a row in any company.

The interpreter adds as numpy does, so that here the second holds for less; a GPU shows it.
"""

from __future__ import annotations

import pytest
import torch
from headrace.kernels import fixed_order_attention as attention
from headrace.kernels import fixed_order_linear as linear
from headrace.kernels.fixed_order_linear import Tiling
from headrace.kernels.vector_linear import Activation
from torch import Tensor

from .test_paged_attention import BATCHES, SHAPES, Rows, make_case

ERROR = {torch.float32: 2e-6, torch.bfloat16: 1 / 200}


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "n", "k", "activation"), [(1, 40, 512, "none"), (5, 70, 704, "relu"), (19, 130, 256, "gelu")]
)
def test_linear(
    device: torch.device, dtype: torch.dtype, tokens: int, n: int, k: int, activation: Activation
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(tokens, k), torch.randn(n, k) * k**-0.5, torch.randn(n)
    x, weight, bias = (tensor.to(device, dtype) for tensor in (x, weight, bias))
    residual = torch.randn(tokens, n).to(device, dtype)
    wide = (tensor.double() for tensor in (x, weight, bias))
    expected = linear.fixed_order_linear_reference(*wide, activation=activation) + residual.double()
    workspace = linear.Workspace.empty(device)
    described = [Tiling(64, 16, 64, 4, 2, descriptors=True)] if k % 8 == 0 else []
    for how in (None, Tiling(64, 16, 64, 4, 2), *described):
        out = linear.fixed_order_linear(
            x, weight, bias, workspace=workspace, activation=activation, residual=residual.clone(), chosen=how
        )
        assert relative(out, expected) < ERROR[dtype]
    assert not workspace.arrivals.any()


@pytest.mark.parametrize(("n", "k"), [(2048, 2048), (2048, 8192), (16384, 2048), (128256, 2048), (768, 768)])
def test_runs_divide_the_columns(n: int, k: int) -> None:
    runs = linear.runs(n, k)
    assert k % runs == 0
    assert k // runs % 64 == 0


def attend(rows: Rows, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> float:
    case = make_case(rows, shape, dtype, device)
    meta, (heads, kv_heads, head_dim) = case.meta, shape
    most = max(seq for _, seq in rows)
    workspace = attention.Workspace.empty(heads, kv_heads, head_dim, 2, most, device)
    out = torch.zeros_like(case.q).flatten(1)
    decodes = meta.num_decodes
    per_tile = {1: [[row, 0] for row in range(decodes)]}
    per_tile[8] = [[row, first] for row in range(decodes, len(rows)) for first in range(0, rows[row][0], 8)]
    for tokens, tiles in per_tile.items():
        if tiles:
            attention.fixed_order_attention(
                case.q,
                case.k_cache,
                case.v_cache,
                block_tables=meta.block_tables,
                table_rows=torch.arange(len(rows), dtype=torch.int32, device=device),
                query_start=meta.query_start,
                seq_lens=meta.seq_lens,
                tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
                tile_tokens=tokens,
                scale=head_dim**-0.5,
                workspace=workspace,
                out=out,
            )
    assert not workspace.arrivals.any()
    return relative(out.view_as(case.q), case.exact.view_as(case.q))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_attention(device: torch.device, rows: Rows, shape: tuple[int, int, int]) -> None:
    assert attend(rows, shape, device, torch.float32) < 2e-6


def test_attention_in_bfloat16(device: torch.device) -> None:
    assert attend(BATCHES["a mix"], SHAPES[1], device, torch.bfloat16) < 1 / 100
