"""The fused linear layers against float64."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.fused_linear import (
    linear_add,
    linear_add_reference,
    norm_gate_up_silu,
    norm_gate_up_silu_reference,
    norm_linear,
    norm_linear_reference,
)
from headrace.kernels.vector_linear import Activation, Tiling, tiling, vector_linear
from torch import Tensor

BF16 = 1 / 128
"""Relative error of one conversion to bfloat16; the interpreter truncates."""


def random(device: torch.device, *shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, torch.bfloat16)


def assert_close(out: Tensor, expected: Tensor, tolerance: float = BF16) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("n", "k"), [(24, 128), (17, 96), (40, 200), (8, 1536)])
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
def test_norm_linear(device: torch.device, tokens: int, n: int, k: int, norm: str) -> None:
    x = random(device, tokens, k) + 0.5
    weight, bias = random(device, n, k, scale=k**-0.5), random(device, n)
    norm_weight = None if norm == "none" else 1 + random(device, k, seed=1) / 8
    norm_bias = random(device, k, seed=2) if norm == "layer" else None
    out = vector_linear(x, weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, eps=1e-5)
    expected = norm_linear_reference(
        x.double(),
        weight.double(),
        bias.double(),
        norm_weight=None if norm_weight is None else norm_weight.double(),
        norm_bias=None if norm_bias is None else norm_bias.double(),
        eps=1e-5,
    )
    assert_close(out, expected)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_whose_weight_is_in_the_matrix(device: torch.device, tokens: int, gated: bool) -> None:
    x, weight = random(device, tokens, 96, scale=3.0), random(device, 40, 96, scale=0.1)
    garbage = random(device, 96, seed=9)
    out = vector_linear(x, weight, norm_weight=garbage, norm_is_folded=True, eps=1e-5, gated=gated)
    ones = torch.ones(96, dtype=torch.float64, device=device)
    if gated:
        expected = norm_gate_up_silu_reference(x.double(), ones, weight.double(), 1e-5)
    else:
        expected = norm_linear_reference(x.double(), weight.double(), norm_weight=ones)
    assert_close(out, expected)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_activation_without_bias(device: torch.device, groups: int, activation: Activation) -> None:
    x, weight = random(device, 1, 96), random(device, 50, 96, scale=0.1)
    out = vector_linear(x, weight, activation=activation, tiles=Tiling(2, groups, 32, 4))
    expected = norm_linear_reference(x.double(), weight.double(), activation=activation)
    assert_close(out, expected)
    assert activation == "gelu" or (out == 0).any()


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("size", "k"), [(16, 64), (26, 320)])
def test_gate_up(device: torch.device, tokens: int, groups: int, size: int, k: int) -> None:
    x, norm_weight = random(device, tokens, k), 1 + random(device, k, seed=1) / 8
    weight = random(device, 2 * size, k, scale=k**-0.5)
    out = vector_linear(
        x, weight, norm_weight=norm_weight, eps=1e-6, gated=True, tiles=Tiling(4, groups, 64, 4)
    )
    expected = norm_gate_up_silu_reference(x.double(), norm_weight.double(), weight.double(), 1e-6)
    assert_close(out, expected)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_add_is_in_place(device: torch.device, tokens: int, with_bias: bool) -> None:
    x, weight = random(device, tokens, 320), random(device, 36, 320, scale=0.1)
    bias = random(device, 36) if with_bias else None
    residual = random(device, tokens, 36, seed=3)
    expected = linear_add_reference(
        x.double(), weight.double(), None if bias is None else bias.double(), residual.double()
    )
    out = vector_linear(x, weight, bias=bias, residual=residual)
    assert out is residual
    assert_close(out, expected)


@pytest.mark.parametrize("tokens", [1, 5])
def test_dispatch_on_this_device(device: torch.device, tokens: int) -> None:
    x, weight, bias = random(device, tokens, 128), random(device, 64, 128, scale=0.1), random(device, 64)
    norm_weight = 1 + random(device, 128, seed=1) / 8
    wide = [t.double() for t in (x, weight, bias, norm_weight)]
    assert_close(
        norm_linear(x, weight, bias, norm_weight=norm_weight),
        norm_linear_reference(wide[0], wide[1], wide[2], norm_weight=wide[3]),
        2 * BF16,
    )
    assert_close(
        norm_gate_up_silu(x, norm_weight, weight, 1e-5),
        norm_gate_up_silu_reference(wide[0], wide[3], wide[1], 1e-5),
        2 * BF16,
    )
    residual = random(device, tokens, 64, seed=5)
    expected = linear_add_reference(wide[0], wide[1], wide[2], residual.double())
    assert_close(linear_add(x, weight, bias, residual), expected, 2 * BF16)


@pytest.mark.parametrize("k", [768, 896, 1024, 1536, 2048, 3072, 4096, 8192, 8960, 14336])
@pytest.mark.parametrize("n", [768, 2048, 151936])
@pytest.mark.parametrize("gated", [False, True])
def test_tilings_fit_the_registers(n: int, k: int, gated: bool) -> None:
    chosen = tiling(n, k, gated)
    loaded = chosen.rows * (2 if gated else 1) * -(-k // chosen.block_k) * chosen.block_k
    assert loaded * chosen.groups <= 160 * 32 * chosen.num_warps
    assert chosen.num_warps % chosen.groups == 0
    assert chosen.block_k & (chosen.block_k - 1) == 0


@pytest.mark.parametrize("tokens", [1, 3, 12, 40])
def test_float32_keeps_its_precision(device: torch.device, tokens: int) -> None:
    x, weight, gate_up = (random(device, *shape).float() for shape in ((tokens, 256), (96, 256), (192, 256)))
    norm, bias = 1 + random(device, 256).float() / 8, random(device, 96).float()
    out = norm_linear(x, weight, bias, norm_weight=norm, eps=1e-5)
    exact = norm_linear_reference(
        x.double(), weight.double(), bias.double(), norm_weight=norm.double(), eps=1e-5
    )
    assert_close(out, exact, 1e-6)
    gated = norm_gate_up_silu(x, norm, gate_up, 1e-5)
    assert_close(gated, norm_gate_up_silu_reference(x.double(), norm.double(), gate_up.double(), 1e-5), 1e-6)
    residual = random(device, tokens, 96, seed=3).float()
    exact = linear_add_reference(x.double(), weight.double(), bias.double(), residual.double())
    assert_close(linear_add(x, weight, bias, residual), exact, 1e-6)
