"""Attention over pages, torch and Triton, against softmax written out in float64 row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import pytest
import torch
from headrace.kernels.paged_attention import AttentionMetadata, paged_attention_reference
from headrace.kernels.paged_prefill import paged_prefill, tile_tokens
from torch import Tensor

Rows: TypeAlias = list[tuple[int, int]]
"""(query tokens, sequence length) of each row, single tokens first."""

BATCHES: dict[str, Rows] = {
    "one decode": [(1, 1)],
    "decodes of similar length": [(1, 17), (1, 1), (1, 30)],
    "decodes of very different length": [(1, 380), (1, 3), (1, 370), (1, 40)],
    "a prompt": [(33, 33)],
    "a chunk": [(9, 50)],
    "a mix": [(1, 5), (1, 290), (4, 4), (40, 90), (2, 16)],
}
SHAPES = [(4, 4, 16), (9, 3, 64), (8, 1, 12)]
"""heads, kv_heads, head_dim"""
BLOCK = 16


class Case(NamedTuple):
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    meta: AttentionMetadata
    exact: Tensor
    """float64, as `paged_attention` returns it"""


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[query_len, heads, head_dim] of the last tokens of a sequence; keys [seq_len, kv_heads, head_dim]."""
    query_len, heads, _ = q.shape
    seq_len, kv_heads, _ = keys.shape
    keys = keys.double().repeat_interleave(heads // kv_heads, dim=1)
    values = values.double().repeat_interleave(heads // kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    position = torch.arange(seq_len - query_len, seq_len, device=q.device)
    later = torch.arange(seq_len, device=q.device)[None] > position[:, None]
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def make_case(rows: Rows, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Case:
    """Pages scattered over a cache, all of it filled: what belongs to nobody must not show."""
    torch.manual_seed(0)
    heads, kv_heads, head_dim = shape
    query_lens, seq_lens = [query for query, _ in rows], [seq for _, seq in rows]
    needed = [-(-seq // BLOCK) for seq in seq_lens]
    tables = torch.zeros(len(rows), max(needed), dtype=torch.int32, device=device)
    scattered = torch.randperm(sum(needed) + 1, device=device)[1:].int()
    for row, blocks in enumerate(scattered.split_with_sizes(needed)):
        tables[row, : len(blocks)] = blocks
    cache = torch.randn(2, sum(needed) + 1, BLOCK, kv_heads, head_dim, device=device).to(dtype)
    q = torch.randn(sum(query_lens), heads, head_dim, device=device).to(dtype)
    meta = AttentionMetadata(
        slot_mapping=torch.zeros(0, dtype=torch.int64, device=device),
        block_tables=tables,
        query_start=torch.tensor([0, *query_lens], device=device).cumsum(0).int(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        num_decodes=query_lens.count(1),
        max_seq_len=max(seq_lens),
        query_lens_host=query_lens,
        seq_lens_host=seq_lens,
    )
    parts = []
    for row, queries in enumerate(q.split_with_sizes(query_lens)):
        keys, values = cache[:, tables[row].long()].flatten(1, 2)[:, : seq_lens[row]]
        parts.append(attend(queries, keys, values, head_dim**-0.5))
    return Case(q, cache[0], cache[1], meta, torch.cat(parts).flatten(1))


def torch_path(case: Case, scale: float) -> Tensor:
    return paged_attention_reference(case.q, case.k_cache, case.v_cache, case.meta, scale)


def triton_path(case: Case, scale: float) -> Tensor:
    head_bytes = case.q.shape[2] * case.q.element_size()
    tokens = tile_tokens(case.q.shape[1], case.k_cache.shape[2], head_bytes)
    lens = list(enumerate(case.meta.query_lens_host))
    tiles = [(row, first) for row, length in lens for first in range(0, length, tokens)]
    device = case.q.device
    return paged_prefill(
        case.q,
        case.k_cache,
        case.v_cache,
        block_tables=case.meta.block_tables,
        table_rows=torch.arange(len(lens), dtype=torch.int32, device=device),
        query_start=case.meta.query_start,
        seq_lens=case.meta.seq_lens,
        tiles=torch.tensor(tiles, dtype=torch.int32, device=device),
        scale=scale,
    )


PATHS = [torch_path, triton_path]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_batches(
    path: Callable[[Case, float], Tensor], rows: Rows, shape: tuple[int, int, int], device: torch.device
) -> None:
    case = make_case(rows, shape, torch.float32, device)
    torch.testing.assert_close(path(case, shape[2] ** -0.5).double(), case.exact, atol=1e-5, rtol=0)


def test_wide_heads_of_float32_fit(device: torch.device) -> None:
    case = make_case([(1, 40), (40, 70)], (2, 1, 256), torch.float32, device)
    torch.testing.assert_close(triton_path(case, 256**-0.5).double(), case.exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(path: Callable[[Case, float], Tensor], dtype: torch.dtype, device: torch.device) -> None:
    case = make_case(BATCHES["a mix"], (9, 3, 64), dtype, device)
    ours = path(case, 64**-0.5)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), case.exact, atol=2e-2, rtol=2e-2)


def test_one_plan_serves_all_layers(device: torch.device) -> None:
    case = make_case(BATCHES["a mix"], (4, 4, 16), torch.float32, device)
    torch_path(case, 0.25)
    (plan,) = case.meta._plans.values()
    torch_path(case, 0.25)
    assert list(case.meta._plans.values()) == [plan]
    assert [group.rows.tolist() for group in plan.decodes] == [[1], [0]]
