"""Linear layers by matrix instructions, against float64. Gluon has no interpreter."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.fused_linear import (
    linear_add_reference,
    norm_gate_up_silu_reference,
    norm_linear_reference,
)
from headrace.kernels.small_batch_linear import Split, small_batch_linear, split
from torch import Tensor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = 1 / 200
"""Relative error of a result in bfloat16 whose input was scaled in bfloat16."""


def random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, torch.bfloat16)


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < BF16, f"relative error {error:.2e}"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 16])
@pytest.mark.parametrize(("n", "k"), [(40, 128), (17, 96), (50, 1536), (64, 8960)])
def test_norm_linear(device: torch.device, tokens: int, n: int, k: int) -> None:
    x, weight, bias = random(device, tokens, k), random(device, n, k, scale=k**-0.5), random(device, n)
    norm_weight = 1 + random(device, k) / 8
    out = small_batch_linear(x, weight, norm_weight=norm_weight, eps=1e-5, bias=bias, relu=True)
    expected = norm_linear_reference(
        x.double(),
        weight.double(),
        bias.double(),
        norm_weight=norm_weight.double(),
        eps=1e-5,
        activation="relu",
    )
    assert_close(out, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [2, 16])
@pytest.mark.parametrize("chosen", [None, Split(2, 32, 1, 32), Split(4, 32, 2, 64)])
def test_gate_up(device: torch.device, tokens: int, chosen: Split | None) -> None:
    x, weight = random(device, tokens, 256), random(device, 200, 256, scale=0.1)
    norm_weight = 1 + random(device, 256) / 8
    out = small_batch_linear(x, weight, norm_weight=norm_weight, eps=1e-6, gated=True, chosen=chosen)
    expected = norm_gate_up_silu_reference(x.double(), norm_weight.double(), weight.double(), 1e-6)
    assert_close(out, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [3, 12])
def test_residual_in_place(device: torch.device, tokens: int) -> None:
    x, weight = random(device, tokens, 3072), random(device, 72, 3072, scale=0.02)
    residual = random(device, tokens, 72)
    expected = linear_add_reference(x.double(), weight.double(), None, residual.double())
    assert small_batch_linear(x, weight, residual=residual) is residual
    assert_close(residual, expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [96, 768, 896, 1024, 1536, 2048, 3072, 4096, 8192, 8960, 14336])
def test_splits_cover_the_columns(k: int, gated: bool) -> None:
    chosen = split(k, gated)
    assert chosen is not None
    pieces, rest = divmod(k, chosen.num_warps * chosen.columns)
    assert rest == 0
    assert 1 <= chosen.ahead <= pieces
    assert chosen.columns & (chosen.columns - 1) == 0


def test_columns_that_cannot_be_split() -> None:
    assert split(100) is None
