"""Decode attention against float64, over contexts of one token to many pieces."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.decode_attention import DecodeTuning, decode_attention, decode_attention_reference
from headrace.kernels.decode_plan import MANY_ROWS, DecodePlan, plan_decode
from torch import Tensor

BF16 = 1 / 64
"""Relative error of bfloat16 weights and values; the interpreter truncates."""


class Case:
    """Random tensors of one step; the cache's unused places hold NaN."""

    def __init__(
        self, device: torch.device, seq_lens: list[int], heads: int, kv_heads: int, head_dim: int, norm: bool
    ) -> None:
        torch.manual_seed(0)
        self.block_size, rows = 16, len(seq_lens)
        blocks = [-(-seq_len // self.block_size) for seq_len in seq_lens]
        order = torch.randperm(sum(blocks)) + 1
        tables = torch.zeros(rows, max(blocks), dtype=torch.int32)
        shape = (sum(blocks) + 1, self.block_size, kv_heads, head_dim)
        caches = [torch.full(shape, torch.nan) for _ in range(2)]
        for row, seq_len in enumerate(seq_lens):
            mine, order = order[: blocks[row]], order[blocks[row] :]
            tables[row, : blocks[row]] = mine
            for cache in caches:
                places = (mine[:, None] * self.block_size + torch.arange(self.block_size)).flatten()
                old = places[: max(seq_len - 1, 0)]
                cache.view(-1, kv_heads, head_dim)[old] = torch.randn(len(old), kv_heads, head_dim)
        angles = torch.rand(max(seq_lens) + 1, head_dim // 2) * 7
        rotation = torch.stack([angles.cos(), -angles.sin(), angles.sin()], 1)
        qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim)
        weights = [1 + torch.randn(head_dim) / 8 for _ in range(2)]
        self.qkv, self.k_cache, self.v_cache, self.rotation, *norms = (
            x.to(device, torch.bfloat16) for x in (qkv, *caches, rotation, *weights)
        )
        self.q_norm: Tensor | None = norms[0] if norm else None
        self.k_norm: Tensor | None = norms[1] if norm else None
        self.tables, self.seq_lens = tables.to(device), torch.tensor(seq_lens, dtype=torch.int32).to(device)
        self.plan = DecodePlan.empty(rows + 1, heads, kv_heads, head_dim, device, 24, 64)
        self.scale = head_dim**-0.5

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        k_cache, v_cache = self.k_cache.double(), self.v_cache.double()
        wide = (x if x is None else x.double() for x in (self.rotation, self.q_norm, self.k_norm))
        rotation, q_norm, k_norm = wide
        out = decode_attention_reference(
            self.qkv.double(),
            k_cache,
            v_cache,
            self.tables,
            self.seq_lens,
            scale=self.scale,
            rotation=rotation,
            q_norm=q_norm,
            k_norm=k_norm,
        )
        return out, k_cache, v_cache

    def run(self, table_rows: Tensor | None = None, **options: bool | DecodeTuning | Tensor | None) -> Tensor:
        plan_decode(self.plan, self.seq_lens, table_rows)
        return decode_attention(
            self.qkv,
            self.k_cache,
            self.v_cache,
            self.tables,
            self.plan,
            scale=self.scale,
            rotation=self.rotation,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            **options,  # type: ignore[arg-type]
        )


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).norm() / expected.norm()
    assert error < BF16, f"relative error {error:.2e}"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "norm"),
    [(8, 2, 64, False), (4, 2, 128, True), (6, 1, 80, False), (3, 3, 32, True)],
)
def test_against_float64(device: torch.device, heads: int, kv_heads: int, head_dim: int, norm: bool) -> None:
    case = Case(device, [1, 17, 64, 65, 300], heads, kv_heads, head_dim, norm)
    expected, k_cache, v_cache = case.expected()
    out = case.run()
    assert_close(out, expected)
    for cache, wanted in ((case.k_cache, k_cache), (case.v_cache, v_cache)):
        stored = ~wanted.isnan()
        assert (cache.isnan() == wanted.isnan()).all(), "wrote where it should not, or not where it should"
        assert_close(cache[stored], wanted[stored])
    assert (case.plan.arrivals == 0).all()


@pytest.mark.parametrize(
    ("in_features", "with_bias", "parts"), [(100, True, 0), (2000, False, 0), (80, True, 5), (160, False, 40)]
)
def test_a_late_norm_of_the_projections(
    device: torch.device, in_features: int, with_bias: bool, parts: int
) -> None:
    case = Case(device, [1, 40, 130], 4, 2, 64, True)
    late = (3 * torch.randn(3, in_features, device=device)).bfloat16()
    bias = torch.randn(case.qkv.shape[1], device=device).bfloat16() if with_bias else None
    scale = late.double().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    squares = None
    if parts:
        squares = late.float().square().view(3, parts, -1).sum(-1).t().contiguous()
        late = torch.full_like(late, torch.nan)  # it is not read
    out = case.run(late=late, squares=squares, bias=bias)
    case.qkv = (case.qkv.double() * scale + (0 if bias is None else bias)).bfloat16()
    expected, k_cache, v_cache = case.expected()
    assert_close(out, expected)
    for cache, wanted in ((case.k_cache, k_cache), (case.v_cache, v_cache)):
        stored = ~wanted.isnan()
        assert_close(cache[stored], wanted[stored])


def test_many_rows_are_cut_less(device: torch.device) -> None:
    lens = [600, 300, 257, 256, 1, 2, 64, 65, 17, 128, 100]
    case = Case(device, lens, 12, 12, 16, False)
    expected, *_ = case.expected()
    out = case.run()
    work = case.plan.work.cpu()
    count = int((work[:, 0] >= 0).sum())
    assert count == sum(-(-length // 256) for length in lens)
    assert_close(out, expected)


@pytest.mark.parametrize(("rows", "kv_heads"), [(MANY_ROWS, 1), (66, 2)])
def test_where_rows_are_left_whole_the_longest_come_first(
    device: torch.device, rows: int, kv_heads: int
) -> None:
    lens = [1 + 61 * row % 90 for row in range(rows)] + [0, 700, 0, 433]
    case = Case(device, lens, 2, kv_heads, 16, False)
    expected, *_ = case.expected()
    assert_close(case.run()[case.seq_lens > 0], expected[case.seq_lens > 0])
    work = case.plan.work.cpu()
    lengths = (work[:, 3] - work[:, 2])[work[:, 0] >= 0].tolist()
    assert lengths[:5] == [256, 256, 188, 256, 177], (
        "pieces of the longest rows first, a row's of equal length"
    )
    rest = [-(-length // 64) for length in lengths[5:]]
    assert rest == sorted(rest, reverse=True)


def test_rows_elsewhere_in_the_tables_and_rows_left_out(device: torch.device) -> None:
    case = Case(device, [40, 100, 7], 4, 2, 32, False)
    expected, *_ = case.expected()
    order = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    shuffled = torch.zeros_like(case.tables)
    shuffled[order.long()] = case.tables
    case.tables = shuffled
    case.seq_lens[1] = 0
    out = case.run(order)
    assert_close(out[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("tuning", [DecodeTuning(16, 4, 2), DecodeTuning(32, 2, 3), DecodeTuning(128, 4, 2)])
@pytest.mark.parametrize("reads_ahead", [False, True])
def test_tunings_agree(device: torch.device, tuning: DecodeTuning, reads_ahead: bool) -> None:
    case = Case(device, [200, 33], 4, 1, 64, False)
    expected, *_ = case.expected()
    assert_close(case.run(tuning=tuning, reads_ahead=reads_ahead), expected)


def test_the_plan_fits_any_lengths(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, kv_heads in ((1, 8), (3, 2), (17, 8), (64, 8), (65, 2), (100, 12), (129, 2), (256, 8)):
        plan = DecodePlan.empty(rows, kv_heads, kv_heads, 16, device)
        for longest in (1, 100, 5000, 100_000):
            seq_lens = torch.randint(1, longest + 1, (rows,), generator=generator, dtype=torch.int32)
            plan_decode(plan, seq_lens.to(device))
            work = plan.work.cpu()
            work = work[work[:, 0] >= 0].T
            covered = torch.zeros(rows, dtype=torch.int64).index_add_(
                0, work[0].long(), (work[3] - work[2]).long()
            )
            assert covered.tolist() == seq_lens.tolist()
            assert (work[6] == work[0].bincount(minlength=rows)[work[0].long()]).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="takes the interpreter minutes")
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 2, 128), (16, 8, 128), (8, 8, 64)])
@pytest.mark.parametrize(
    "lens",
    [[1 + 97 * row % 401 for row in range(140)] + [64, 65, 1500], [1 + row % 50 for row in range(256)]],
    ids=["mixed", "short"],
)
def test_very_many_rows_against_float64(
    device: torch.device, lens: list[int], heads: int, kv_heads: int, head_dim: int
) -> None:
    case = Case(device, lens, heads, kv_heads, head_dim, False)
    expected, *_ = case.expected()
    out = case.run()
    assert_close(out, expected)
    assert (case.plan.arrivals == 0).all()
    assert (case.run() == out).all(), "the same step, another result"
