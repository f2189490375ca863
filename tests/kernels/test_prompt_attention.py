"""Attention of prompts by warpgroup instructions, against float64. Gluon has no interpreter."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from headrace.kernels.prompt_attention import PromptCache, prompt_attention, prompt_cache
from torch import Tensor

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
LENGTHS = {
    "one token": [(0, 1)],
    "whole prompts": [(0, 1), (0, 17), (0, 64), (0, 65), (0, 511), (0, 1000)],
    "chunks beside them": [(5, 3), (128, 128), (300, 200), (129, 1), (0, 40), (1000, 77), (16, 500)],
    "long": [(127, 1), (128, 1), (4000, 16), (0, 2500)],
}
"""Rows of (tokens before the step, tokens in it)."""


class Step(NamedTuple):
    """A packed step, and what its attention must be."""

    qkv: Tensor
    cache: PromptCache
    block_tables: Tensor
    table_rows: Tensor
    query_start: Tensor
    seq_lens: Tensor
    tiles: Tensor
    expected: Tensor

    def attend(self) -> Tensor:
        tokens, all_heads, head_dim = self.qkv.shape
        size = (all_heads - 2 * self.cache.kv_heads) * head_dim
        return prompt_attention(
            self.qkv,
            self.cache,
            block_tables=self.block_tables,
            table_rows=self.table_rows,
            query_start=self.query_start,
            seq_lens=self.seq_lens,
            tiles=self.tiles,
            scale=head_dim**-0.5,
            out=torch.full((tokens, size), float("nan"), dtype=self.qkv.dtype, device="cuda"),
        )


def make_step(
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    block_size: int = 16,
) -> Step:
    """Whatever no token was written to is not a number."""
    torch.manual_seed(heads)
    qkv = torch.randn(sum(new for _, new in rows), heads + 2 * kv_heads, head_dim).to(dtype)
    counts = [-(-(old + new) // block_size) for old, new in rows]
    numbers = torch.randperm(sum(counts)) + 1
    k_cache, v_cache = torch.full(
        (2, sum(counts) + 1, block_size, kv_heads, head_dim), float("nan"), dtype=dtype
    )
    tables = torch.zeros(len(rows) + 2, max(counts) + 1, dtype=torch.int32)
    starts, expected = [0], []
    for row, ((old, new), blocks) in enumerate(zip(rows, numbers.split(counts), strict=True)):
        tables[row + 1, : len(blocks)] = blocks
        q, k, v = qkv[starts[-1] : starts[-1] + new].split([heads, kv_heads, kv_heads], dim=1)
        k, v = (torch.cat((torch.randn(old, kv_heads, head_dim).to(dtype), x)) for x in (k, v))
        position = torch.arange(old + new)
        slots = blocks[position // block_size] * block_size + position % block_size
        k_cache.view(-1, kv_heads, head_dim)[slots], v_cache.view(-1, kv_heads, head_dim)[slots] = k, v
        expected.append(exact(q.cuda(), k.cuda(), v.cuda()))
        starts.append(starts[-1] + new)
    cache = prompt_cache(k_cache.cuda(), v_cache.cuda())
    assert cache is not None
    step = cache.tuning.tile_tokens
    tiles = [(row, first) for row, (_, new) in enumerate(rows) for first in range(0, new, step)]
    ends = [old + new for old, new in rows]
    table_rows, query_start, seq_lens, all_tiles = (
        torch.tensor(values, dtype=torch.int32).cuda()
        for values in (range(1, len(rows) + 1), starts, ends, [*tiles, (-1, -1)])
    )
    return Step(
        qkv.cuda(),
        cache,
        tables.cuda(),
        table_rows,
        query_start,
        seq_lens,
        all_tiles,
        torch.cat(expected),
    )


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last tokens of a sequence in float64, [tokens, heads * head_dim]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu_(1 + len(k) - len(q))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill_(later, -torch.inf).softmax(-1), v).flatten(1)


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < 1 / 200, f"relative error {error:.2e}"


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 4), (6, 2), (8, 2), (12, 2), (7, 1), (8, 1)])
def test_against_float64(lengths: str, heads: int, kv_heads: int, head_dim: int) -> None:
    step = make_step(LENGTHS[lengths], heads, kv_heads, head_dim)
    assert_close(step.attend(), step.expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [8, 16, 64, 256])
def test_blocks_and_dtypes(dtype: torch.dtype, block_size: int, head_dim: int) -> None:
    step = make_step(LENGTHS["chunks beside them"], 8, 2, head_dim, dtype, block_size)
    assert_close(step.attend(), step.expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_of_many_heads_each_program_computes_several_tiles(head_dim: int) -> None:
    step = make_step([(0, 1500), (700, 900), (0, 300)], 64, 8, head_dim)
    assert_close(step.attend(), step.expected)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_results_are_always_the_same(head_dim: int) -> None:
    step = make_step(LENGTHS["chunks beside them"], 32, 8, head_dim)
    first = step.attend()
    for _ in range(50):
        assert torch.equal(step.attend(), first)


@pytest.mark.gpu
@needs_hopper
def test_a_neighbour_that_is_not_finite_disturbs_nobody() -> None:
    rows = [(0, 100), (0, 100), (40, 30)]
    step = make_step(rows, 8, 2, 128)
    step.qkv[100:200] = float("nan")
    out = step.attend()
    assert_close(out[:100], step.expected[:100])
    assert_close(out[200:], step.expected[200:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_hopper_gpu_others_serve(dtype: torch.dtype) -> None:
    blocks = torch.empty(1, 16, 2, 64, dtype=dtype)
    assert prompt_cache(blocks, blocks) is None
