"""Linear layers by warpgroup instructions, against float64. Gluon has no interpreter."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels import hopper
from headrace.kernels.fused_linear import linear_add_reference, norm_linear_reference
from headrace.kernels.medium_batch_linear import (
    MAX_TOKENS,
    Tiling,
    chosen,
    medium_batch_linear,
    parts_of,
    tiling,
)
from headrace.kernels.rms_norm import row_squares
from torch import Tensor

needs_gluon = pytest.mark.skipif(
    not hopper.AVAILABLE, reason="this Triton has no Gluon, so cuBLAS multiplies everything"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = 1 / 200
"""Relative error of a result in bfloat16."""
EPS = 1e-5


def random(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).to(device, torch.bfloat16)


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < BF16, f"relative error {error:.2e}"


TILINGS = [
    Tiling(64, 32, 64, 4),
    Tiling(64, 64, 128, 2, 4),
    Tiling(64, 128, 64, 4, 2),
    Tiling(128, 64, 64, 4, 8),
    Tiling(128, 128, 64, 3),
    Tiling(128, 128, 64, 6, 4),
    Tiling(128, 32, 128, 5),
    Tiling(64, 32, 128, 3, 4),
    Tiling(64, 32, 64, 4, 8),
]
GATED = [
    Tiling(128, 128, 64, 3),
    Tiling(128, 32, 128, 5),
    Tiling(128, 128, 64, 4, 2),
    Tiling(128, 64, 64, 4, 8),
    Tiling(128, 32, 128, 2, 2),
    Tiling(128, 32, 64, 2, 8),
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("tokens", [17, 31, 96, 100, 128, 250])
@pytest.mark.parametrize(("n", "k"), [(300, 1536), (1000, 840), (64, 8960)])
def test_linear(device: torch.device, tokens: int, n: int, k: int, tiling: Tiling) -> None:
    x, weight, bias = random(device, tokens, k), random(device, n, k, scale=k**-0.5), random(device, n)
    out = medium_batch_linear(x, weight, tiling=tiling, bias=bias, relu=True)
    expected = norm_linear_reference(x.double(), weight.double(), bias.double(), activation="relu")
    assert_close(out, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", GATED, ids=str)
@pytest.mark.parametrize("tokens", [17, 64, 100, 200])
@pytest.mark.parametrize("k", [256, 1096])
def test_gate_up(device: torch.device, k: int, tokens: int, tiling: Tiling) -> None:
    x, weight = random(device, tokens, k, scale=3.0), random(device, 400, k, scale=0.1)
    out = medium_batch_linear(x, weight, tiling=tiling, squares=row_squares(x), eps=EPS, gated=True)
    scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    gate, up = ((x.double() * scale) @ weight.double().t()).chunk(2, dim=-1)
    assert_close(out, torch.nn.functional.silu(gate) * up)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_residual_in_place(device: torch.device, tiling: Tiling) -> None:
    x, weight = random(device, 77, 3072), random(device, 200, 3072, scale=0.02)
    residual = random(device, 77, 200)
    expected = linear_add_reference(x.double(), weight.double(), None, residual.double())
    assert medium_batch_linear(x, weight, tiling=tiling, residual=residual) is residual
    assert_close(residual, expected)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize("tokens", [17, 100, 128])
def test_squares_left_are_those_of_the_next_norm(device: torch.device, tokens: int, tiling: Tiling) -> None:
    x, weight = random(device, tokens, 1000, scale=3.0), random(device, 2120, 1000, scale=0.1)
    residual = random(device, tokens, 2120)
    squares = torch.full((parts_of(tiling, 2120), tokens), float("nan"), device=device)
    medium_batch_linear(x, weight, tiling=tiling, residual=residual, leave_squares=squares)
    expected = residual.double().square().sum(-1)
    torch.testing.assert_close(squares.double().sum(0), expected, rtol=1e-5, atol=0.0)
    following = random(device, 512, 2120, scale=0.02)
    gated = Tiling(128, 64, 64, 3)
    out = medium_batch_linear(residual, following, tiling=gated, squares=squares, eps=EPS, gated=True)
    again = medium_batch_linear(
        residual, following, tiling=gated, squares=row_squares(residual), eps=EPS, gated=True
    )
    assert_close(out, again.double())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tiling", [t for t in TILINGS if t.shares > 1], ids=str)
def test_shares_add_up_in_the_same_order(device: torch.device, tiling: Tiling) -> None:
    x, weight = random(device, 128, 4096), random(device, 1024, 4096, scale=0.02)
    first = medium_batch_linear(x, weight, tiling=tiling)
    for _ in range(50):
        assert torch.equal(medium_batch_linear(x, weight, tiling=tiling), first)


@pytest.mark.gpu
@needs_gpu
def test_products_of_different_shares_count_together(device: torch.device) -> None:
    """One after the other on the same counters, which never go back to zero."""
    x, weight = random(device, 128, 4096), random(device, 512, 4096, scale=0.02)
    tilings = [t for t in TILINGS if t.shares > 1]
    expected = [medium_batch_linear(x, weight, tiling=t) for t in tilings]
    for i in range(100):
        which = i * i % len(tilings)
        assert torch.equal(medium_batch_linear(x, weight, tiling=tilings[which]), expected[which])


@pytest.mark.gpu
@needs_gpu
def test_float32_is_left_to_cublas(device: torch.device) -> None:
    x, weight = torch.ones(32, 1024, device=device), torch.ones(1024, 1024, device=device)
    assert chosen(x, weight) is None
    assert chosen(x.bfloat16(), weight.bfloat16()) is not None


@needs_gluon
@pytest.mark.parametrize("tokens", [17, 32, 33, 64, 100, 128, 193, 256])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [768, 1024, 1536, 2048, 3072, 4096, 8192, 8960, 14336])
@pytest.mark.parametrize("n", [768, 1024, 1536, 2048, 3072, 4096, 6144, 8960, 14336, 151936])
def test_tilings_can_run(n: int, k: int, gated: bool, tokens: int) -> None:
    chosen = tiling(tokens, n, k, gated)
    if chosen is None:
        assert tokens > MAX_TOKENS
        return
    outputs = chosen.rows // 2 if gated else chosen.rows
    programs = -(-n // outputs) * -(-tokens // chosen.tokens) * chosen.shares
    assert chosen.shares == 1 or programs <= 132, "programs that wait for each other must run at once"
    assert chosen.tokens >= 4 * chosen.shares
    assert chosen.stages >= 2
    assert chosen.stages * (chosen.rows + chosen.tokens) * chosen.block_k * 2 <= 227 * 1024 - 1024
    assert chosen.rows * chosen.tokens <= 128 * 128, "the sums must fit the registers"
    assert chosen.rows == 128 or not gated, "gate and up meet in one thread"


@needs_gluon
def test_before_attention_the_ring_leaves_room() -> None:
    usual, before_attention = tiling(128, 2048, 1536), tiling(128, 2048, 1536, leaves_room=True)
    assert usual is not None
    assert before_attention is not None
    assert before_attention == usual._replace(stages=before_attention.stages)
    assert before_attention.stages * (usual.rows + usual.tokens) * usual.block_k * 2 <= 150 * 1024


@pytest.mark.parametrize(
    ("tokens", "k"), [(16, 1024), (129, 1024), (192, 8960), (256, 1024), (257, 8960), (64, 1020)]
)
def test_what_is_left_to_others(tokens: int, k: int) -> None:
    assert tiling(tokens, 1024, k) is None


@needs_gluon
def test_few_rows_of_many_columns_are_multiplied_with_more_tokens() -> None:
    assert tiling(193, 2048, 8192) == tiling(256, 1536, 8960) == Tiling(128, 128, 64, 6, 4)
    assert tiling(256, 2056, 8192) is None
    assert tiling(256, 1536, 8960, gated=True) is None
