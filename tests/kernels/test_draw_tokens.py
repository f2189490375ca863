"""Drawing tokens: the kernel draws what the reference draws."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.draw_tokens import draw_tokens, draw_tokens_reference, draw_tokens_triton
from torch import Tensor


def make(
    device: torch.device, rows: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(rows + columns)
    logits = torch.randn(rows, columns).to(device, dtype) * 3
    temperatures = torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(rows)[:rows].to(device)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,)).to(device)
    positions = torch.randint(0, 10_000, (rows,), dtype=torch.int32).to(device)
    return logits, temperatures, seeds, positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (4, 1024), (4, 3001), (7, 5000)])
def test_draws_what_the_reference_draws(
    device: torch.device, rows: int, columns: int, dtype: torch.dtype
) -> None:
    arguments = make(device, rows, columns, dtype)
    drawn = draw_tokens_triton(*arguments)
    assert drawn.tolist() == draw_tokens_reference(*arguments).tolist()
    assert draw_tokens(*arguments).tolist() == drawn.tolist()


def test_slots_say_where_a_row_finds_its_parameters(device: torch.device) -> None:
    logits, temperatures, seeds, positions = make(device, 6, 300, torch.float32)
    slots = torch.tensor([3, 1, 5, 0, 2, 4], dtype=torch.int32, device=device)
    table = torch.zeros(6, 3, device=device)
    table[:, 1] = temperatures
    drawn = draw_tokens_triton(logits, table[:, 1], seeds, positions, slots)
    expected = draw_tokens_reference(logits, temperatures[slots.long()], seeds[slots.long()], positions)
    assert drawn.tolist() == expected.tolist()
    assert draw_tokens_reference(logits, table[:, 1], seeds, positions, slots).tolist() == expected.tolist()


def test_the_first_of_equal_scores_wins(device: torch.device) -> None:
    logits = torch.zeros(1, 5000, device=device)
    logits[0, [1500, 4000]] = 1.0
    zero = torch.zeros(1, device=device)
    assert draw_tokens_triton(logits, zero, zero.long(), zero.int()).tolist() == [1500]


def test_what_is_below_its_rows_threshold_is_out_of_the_race(device: torch.device) -> None:
    arguments = make(device, 8, 3001, torch.bfloat16)
    thresholds = arguments[0].float().quantile(torch.linspace(0.1, 0.999, 8, device=device), dim=1).diagonal()
    thresholds = thresholds.contiguous()
    thresholds[3] = -torch.inf
    drawn = draw_tokens_triton(*arguments, thresholds=thresholds)
    assert drawn.tolist() == draw_tokens_reference(*arguments, thresholds=thresholds).tolist()
    assert (arguments[0].float().gather(1, drawn[:, None]).squeeze(1) >= thresholds).all()
    assert drawn.tolist() != draw_tokens_triton(*arguments).tolist()
