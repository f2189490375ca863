"""The small kernels of a layer, torch and Triton, against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from headrace.kernels.kv_write import kv_write, rotate_kv_write_reference, rotate_kv_write_triton
from headrace.kernels.layer_norm import layer_norm_reference, layer_norm_triton
from headrace.kernels.rms_norm import rms_norm_reference, rms_norm_triton, row_squares, row_squares_triton
from headrace.kernels.silu_mul import silu_mul_reference, silu_mul_triton
from torch import Tensor

Precision: TypeAlias = tuple[torch.dtype, float]
"""A type, and the relative and absolute error to allow in it."""
PRECISIONS: list[Precision] = [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=PRECISIONS, ids=["float32", "bfloat16"])
def precision(request: pytest.FixtureRequest) -> Precision:
    found: Precision = request.param
    return found


def assert_close(ours: Tensor, exact: Tensor, precision: Precision) -> None:
    dtype, tolerance = precision
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("norm", [rms_norm_reference, rms_norm_triton])
@pytest.mark.parametrize("shape", [(1, 576), (5, 64), (3, 2048), (4, 3, 12)])
@pytest.mark.parametrize("num_updates", [0, 1, 2])
def test_rms_norm(
    norm: Callable[..., Tensor],
    shape: tuple[int, ...],
    num_updates: int,
    precision: Precision,
    device: torch.device,
) -> None:
    x, *updates = torch.randn(1 + num_updates, *shape, device=device).to(precision[0]).unbind()
    weight = torch.randn(shape[-1], device=device).to(precision[0])
    residual = (x.float() + sum(update.float() for update in updates)).to(precision[0])
    exact = residual.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert_close(norm(x, weight, 1e-3, *updates), exact, precision)
    assert_close(x, residual.double(), precision)  # the sum stays; the interpreter rounds it down


@pytest.mark.parametrize("of", [row_squares, row_squares_triton])
def test_row_squares(of: Callable[[Tensor], Tensor], device: torch.device) -> None:
    x = torch.randn(5, 1100, device=device)
    exact = x[:, :1030].double().square().sum(-1)
    torch.testing.assert_close(of(x[:, :1030])[0].double(), exact, rtol=1e-6, atol=0.0)


def test_rms_norm_of_some_heads_of_each_token(device: torch.device) -> None:
    heads = torch.randn(3, 7, 16, device=device)
    weight = torch.randn(16, device=device)
    some = heads[:, 2:5]
    expected = rms_norm_reference(some.contiguous(), weight, 1e-6)
    torch.testing.assert_close(rms_norm_triton(some, weight, 1e-6), expected)


@pytest.mark.parametrize("gate", [silu_mul_reference, silu_mul_triton])
@pytest.mark.parametrize("shape", [(1, 1536), (7, 80), (2, 1025)])
def test_silu_mul(
    gate: Callable[[Tensor], Tensor], shape: tuple[int, int], precision: Precision, device: torch.device
) -> None:
    tokens, size = shape
    gate_up = torch.randn(tokens, 2 * size, device=device).to(precision[0])
    left, right = gate_up.double().chunk(2, dim=-1)
    assert_close(gate(gate_up), left / (1 + (-left).exp()) * right, precision)


@pytest.mark.parametrize("gate", [silu_mul_reference, silu_mul_triton])
@pytest.mark.parametrize(("tokens", "size", "in_features"), [(1, 1536, 64), (5, 80, 1500), (2, 1025, 4096)])
def test_silu_mul_applies_a_late_norm(
    gate: Callable[..., Tensor],
    tokens: int,
    size: int,
    in_features: int,
    precision: Precision,
    device: torch.device,
) -> None:
    gate_up = (3 * torch.randn(tokens, 2 * size, device=device)).to(precision[0])
    x = (3 * torch.randn(tokens, in_features, device=device)).to(precision[0])
    scaled = gate_up.double() * x.double().square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    left, right = scaled.chunk(2, dim=-1)
    assert_close(gate(gate_up, x, 1e-5), left / (1 + (-left).exp()) * right, precision)


def test_silu_mul_takes_the_late_norm_from_squares(device: torch.device) -> None:
    gate_up, x = torch.randn(5, 2050, device=device), torch.randn(5, 132, device=device)
    squares = x.square().view(5, 33, 4).sum(-1).t().contiguous()
    got = silu_mul_triton(gate_up, torch.full_like(x, torch.nan), 1e-5, squares)
    torch.testing.assert_close(got, silu_mul_reference(gate_up, x, 1e-5))


@pytest.mark.parametrize("norm", [layer_norm_reference, layer_norm_triton])
@pytest.mark.parametrize("shape", [(1, 768), (7, 80), (3, 4100)])
def test_layer_norm(
    norm: Callable[..., Tensor], shape: tuple[int, int], precision: Precision, device: torch.device
) -> None:
    x = (5 + 2 * torch.randn(shape, device=device)).to(precision[0])
    weight, bias = torch.randn(2, shape[1], device=device).to(precision[0])
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    before = x.clone()
    assert_close(norm(x, weight, bias, 1e-5), expected, precision)
    assert torch.equal(x, before)
    assert_close(norm(x, weight, bias, 1e-5, weight), expected, precision)
    assert_close(x, before.double() + weight, precision)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [tokens, heads, head_dim] as complex numbers, turned by angles [tokens, head_dim / 2]."""
    real, imaginary = x.double().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("write", [rotate_kv_write_reference, rotate_kv_write_triton])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 12), (32, 1, 16)])
def test_rotate_kv_write(
    write: Callable[..., Tensor],
    heads: int,
    kv_heads: int,
    head_dim: int,
    precision: Precision,
    device: torch.device,
) -> None:
    tokens, blocks, block_size = 5, 6, 4
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device=device).to(precision[0])
    q, k, v = qkv.clone().split_with_sizes((heads, kv_heads, kv_heads), dim=1)
    angles = torch.randn(tokens, head_dim // 2, dtype=torch.float64, device=device)
    rotation = torch.stack((angles.cos(), -angles.sin(), angles.sin()), dim=1).to(precision[0])
    cache = torch.randn(2, blocks, block_size, kv_heads, head_dim, device=device).to(precision[0])
    slots = torch.randperm(blocks * block_size, device=device)[:tokens]
    untouched = torch.ones(blocks * block_size, dtype=torch.bool, device=device)
    untouched[slots] = False
    keys, values = (part.view(-1, kv_heads, head_dim) for part in cache.clone())

    ours = write(qkv, rotation, cache[0], cache[1], slots)
    new_keys, new_values = (part.view(-1, kv_heads, head_dim) for part in cache)
    assert_close(ours, rotated(q, angles), precision)
    assert_close(new_keys[slots], rotated(k, angles), precision)
    assert torch.equal(new_values[slots], v)
    assert torch.equal(new_keys[untouched], keys[untouched])
    assert torch.equal(new_values[untouched], values[untouched])


def test_kv_write(device: torch.device) -> None:
    k, v = torch.randn(2, 3, 2, 8, device=device)
    k_cache, v_cache = torch.zeros(2, 4, 4, 2, 8, device=device)
    kv_write(k, v, k_cache, v_cache, torch.tensor([5, 15, 0], device=device))
    for cache, new in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache.view(16, 2, 8)[[5, 15, 0]], new)
        assert cache.count_nonzero() == new.numel()
