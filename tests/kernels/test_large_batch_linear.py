"""Linear layers of prompts by warpgroup instructions, against float64. Gluon has no interpreter."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.fused_linear import linear_add_reference, norm_linear_reference
from headrace.kernels.large_batch_linear import Tiling, chosen, large_batch_linear, parts_of, tiling
from headrace.kernels.rms_norm import row_squares
from torch import Tensor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = 1 / 200
"""Relative error of a result in bfloat16."""
EPS = 1e-5
TILINGS = [
    Tiling(128, 256, 4),
    Tiling(128, 128, 6, beside=3),
    Tiling(128, 128, 5, turns=True),
    Tiling(64, 256, 4, turns=True, beside=16),
]


def random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator, device=device) * scale).bfloat16()


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < BF16, f"relative error {error:.2e}"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("tokens", [257, 1000, 5000])
@pytest.mark.parametrize(("n", "k"), [(304, 1536), (5000, 840), (1536, 8960)])
def test_linear_of_a_norm(device: torch.device, tokens: int, n: int, k: int, tiling: Tiling) -> None:
    x, weight, bias = (
        random(device, tokens, k, scale=3.0),
        random(device, n, k, scale=k**-0.5),
        random(device, n),
    )
    out = large_batch_linear(x, weight, tiling=tiling, bias=bias, squares=row_squares(x), eps=EPS)
    ones = torch.ones(k, dtype=torch.float64, device=device)
    expected = norm_linear_reference(x.double(), weight.double(), bias.double(), norm_weight=ones, eps=EPS)
    assert_close(out, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_nothing_but_the_product(device: torch.device, tiling: Tiling) -> None:
    x, weight = random(device, 2000, 1024), random(device, 1000, 1024, scale=0.03)
    assert_close(large_batch_linear(x, weight, tiling=tiling), x.double() @ weight.double().t())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("tokens", [257, 1000, 5000])
def test_gate_up(device: torch.device, tokens: int, tiling: Tiling) -> None:
    x, weight = random(device, tokens, 512, scale=3.0), random(device, 2 * 1160, 512, scale=0.1)
    out = large_batch_linear(x, weight, tiling=tiling, squares=row_squares(x), eps=EPS, gated=True)
    scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    gate, up = ((x.double() * scale) @ weight.double().t()).chunk(2, dim=-1)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("tokens", [300, 3000])
def test_residual_in_place_and_its_squares(device: torch.device, tokens: int, tiling: Tiling) -> None:
    x, weight, bias = (
        random(device, tokens, 3072),
        random(device, 2120, 3072, scale=0.02),
        random(device, 2120),
    )
    residual = random(device, tokens, 2120)
    expected = linear_add_reference(x.double(), weight.double(), bias.double(), residual.double())
    squares = torch.full((parts_of(tiling, 2120), tokens), float("nan"), device=device)
    out = large_batch_linear(x, weight, tiling=tiling, bias=bias, residual=residual, leave_squares=squares)
    assert out is residual
    assert_close(residual, expected)
    own = residual.double().square().sum(-1)
    torch.testing.assert_close(squares.double().sum(0), own, rtol=1e-5, atol=0.0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_the_same_bits_every_time_and_from_a_graph(device: torch.device, tiling: Tiling) -> None:
    x, weight = random(device, 4096, 2048), random(device, 4096, 2048, scale=0.02)
    start = random(device, 4096, 4096)
    first = large_batch_linear(x, weight, tiling=tiling, residual=start.clone())
    residual, graph = start.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        large_batch_linear(x, weight, tiling=tiling, residual=residual)
    for _ in range(30):
        residual.copy_(start)
        graph.replay()
        assert torch.equal(residual, first)


@pytest.mark.gpu
@needs_gpu
def test_what_cannot_be_multiplied_is_left_to_cublas(device: torch.device) -> None:
    x, weight = torch.ones(4096, 4096, device=device), torch.ones(4096, 4096, device=device)
    assert chosen(x, weight) is None
    x, weight = x.bfloat16(), weight.bfloat16()
    assert chosen(x, weight) is not None
    assert chosen(x[:, 1:], weight[:, 1:]) is None, "rows are not dense"


@pytest.mark.parametrize("tokens", [257, 400, 1000, 2048, 4096, 16384, 32768])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [768, 1024, 1536, 2048, 3072, 4096, 8192, 8960, 14336])
@pytest.mark.parametrize("n", [768, 1024, 1536, 2048, 3072, 4096, 6144, 8960, 14336, 151936])
def test_tilings_can_run(n: int, k: int, gated: bool, tokens: int) -> None:
    chosen = tiling(tokens, n, k, gated)
    if chosen is None:
        return
    ring = chosen.stages * (chosen.tokens + chosen.rows) * 64
    left = 4 * 64 * (chosen.tokens if chosen.turns else chosen.tokens // 2)
    assert chosen.stages >= 3
    assert 2 * (ring + left) <= 226 * 1024


@pytest.mark.parametrize(("tokens", "n", "k"), [(256, 4096, 4096), (4096, 4096, 4100), (4096, 4100, 4096)])
def test_what_is_left_to_others(tokens: int, n: int, k: int) -> None:
    assert tiling(tokens, n, k) is None
