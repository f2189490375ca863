"""top_k, top_p and min_p: the kernels find the threshold that sorting finds, whatever the row looks like."""

from __future__ import annotations

import math

import pytest
import torch
from headrace.kernels.stay_thresholds import stay_thresholds_reference, stay_thresholds_triton
from torch import Tensor

COLUMNS = 300
BLOCK, LAST_BLOCK = 128, 128
"""So small that every row takes several programs, and the last one several rounds."""


def rows_of_every_shape(dtype: torch.dtype) -> Tensor:
    """Flat, peaked, tied, masked, all equal, of one token, far from zero, around zero."""
    torch.manual_seed(1)
    normal = torch.randn(COLUMNS)
    masked = normal.clone()
    masked[torch.randperm(COLUMNS)[:280]] = -torch.inf
    alone = torch.full((COLUMNS,), -torch.inf)
    alone[77] = 3.0
    shapes = [
        normal,
        normal * 8,
        (normal * 2).round(),
        masked,
        torch.zeros(COLUMNS),
        alone,
        normal * 1e-3 + 500,
        normal.abs() * 1e-20,
        -torch.arange(COLUMNS) / 3.0,
    ]
    return torch.stack(shapes).to(dtype)


WISHES = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (250, 1.0, 0.0),
    (1000, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.1, 0.0),
    (0, 1e-6, 0.0),
    (0, 0.9999, 0.0),
    (20, 0.9, 0.0),
    (250, 0.5, 0.0),
    (1000, 0.7, 0.0),
    (0, 1.0, 0.1),
    (0, 1.0, 1.0),
    (12, 0.8, 0.05),
]
"""top_k, top_p, min_p"""


def stays(logits: Tensor, thresholds: Tensor) -> Tensor:
    return logits.float() >= thresholds[:, None]


def differs_from_sorting(
    found: Tensor, logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor
) -> Tensor:
    """bool [rows]: thresholds that no sorting finds.

    Counts are exact. Sums of float32 weights are not: a border of top_p may move past tokens that are worth
    less than a millionth of the sum, or to where the sum is that close to top_p.
    """
    without_p = stay_thresholds_reference(logits, temperatures, top_k, torch.ones_like(top_p), log_min_p)
    candidates, kept = stays(logits, without_p), stays(logits, found)
    depths = (logits.double() - logits.double().amax(1, keepdim=True)) / temperatures.double()[:, None]
    matters = depths > -31  # what cannot win may stay or not
    by_p = top_p < 1
    wrong = ((kept & ~candidates & matters).any(1)) | (~by_p & ((kept != candidates) & matters).any(1))
    weights = depths.exp() * candidates
    wanted = top_p * weights.sum(1)
    reached, above = (weights * kept).sum(1), (weights * (logits.float() > found[:, None])).sum(1)
    return wrong | (by_p & ((reached < wanted * (1 - 1e-6)) | (above >= wanted * (1 + 1e-6))))


@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.bfloat16, 0.3)])
def test_what_stays_is_what_sorting_says(
    device: torch.device, dtype: torch.dtype, temperature: float
) -> None:
    shapes = rows_of_every_shape(dtype)
    pairs = [(shape, wish) for shape in range(len(shapes)) for wish in range(len(WISHES))]
    if device.type == "cpu":  # the interpreter takes a fifth of a second for a row
        pairs = [(shape, wish) for shape, wish in pairs if (shape + wish) % 5 == (dtype == torch.float32)]
    logits = shapes[[shape for shape, _ in pairs]].to(device)
    wishes = [WISHES[wish] for _, wish in pairs]
    arguments = (
        logits,
        torch.full((len(wishes),), temperature, device=device),
        torch.tensor([k for k, _, _ in wishes], dtype=torch.int32, device=device),
        torch.tensor([p for _, p, _ in wishes], dtype=torch.float64, device=device),
        torch.tensor([math.log(m) if m else -math.inf for _, _, m in wishes], device=device),
    )
    found = stay_thresholds_triton(*arguments, block=BLOCK, count_block=BLOCK, last_block=LAST_BLOCK)
    wrong = differs_from_sorting(found, *arguments)
    assert not [pairs[row] for row in wrong.nonzero().flatten().tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_vocabularies(device: torch.device, dtype: torch.dtype) -> None:
    """Rows of many programs, of which more is gathered than the last program keeps in registers."""
    if device.type == "cpu":
        pytest.skip("the interpreter would take minutes")
    torch.manual_seed(2)
    spreads = torch.tensor([1e-4, 0.3, 1.0, 4.0, 12.0], device=device)
    pairs = [(spread, wish) for spread in range(len(spreads)) for wish in range(len(WISHES))]
    noise = torch.randn(len(pairs), 128256, device=device)
    logits = (noise * spreads[[spread for spread, _ in pairs]][:, None] + 3).to(dtype)
    wishes = [WISHES[wish] for _, wish in pairs]
    arguments = (
        logits,
        torch.ones(len(pairs), device=device),
        torch.tensor([100 * k for k, _, _ in wishes], dtype=torch.int32, device=device),
        torch.tensor([p for _, p, _ in wishes], dtype=torch.float64, device=device),
        torch.tensor([math.log(m) if m else -math.inf for _, _, m in wishes], device=device),
    )
    found = stay_thresholds_triton(*arguments)
    wrong = differs_from_sorting(found, *arguments)
    assert not [pairs[row] for row in wrong.nonzero().flatten().tolist()]
    assert torch.equal(found, stay_thresholds_triton(*arguments))
    few = torch.arange(0, len(pairs), 10, device=device)  # of few rows other programs count
    assert torch.equal(found[few], stay_thresholds_triton(logits[few], *arguments[1:], slots=few))


def test_slots_say_where_a_row_finds_its_parameters(device: torch.device) -> None:
    logits = rows_of_every_shape(torch.float32)[:4].to(device)
    slots = torch.tensor([2, 0, 3, 1], dtype=torch.int32, device=device)
    table = torch.zeros(4, 3, device=device)
    table[:, 0] = torch.tensor([1.0, 0.5, 1.0, 0.0])
    table[:, 2] = -torch.inf
    top_k = torch.tensor([3, 0, 9, 5], dtype=torch.int32, device=device)
    top_p = torch.tensor([1.0, 0.5, 0.9, 0.5], dtype=torch.float64, device=device)
    arguments = (logits, table[:, 0], top_k, top_p, table[:, 2], slots)
    found = stay_thresholds_triton(*arguments, block=BLOCK, count_block=BLOCK, last_block=LAST_BLOCK)
    assert found.tolist() == stay_thresholds_reference(*arguments).tolist()
    assert found[2] == -torch.inf  # of temperature 0 the likeliest is taken


def test_a_row_without_a_finite_logit_stops_nobody(device: torch.device) -> None:
    logits = torch.full((3, COLUMNS), -torch.inf, device=device)
    logits[1] = torch.arange(COLUMNS)
    logits[2, 5] = torch.inf
    ones, off = torch.ones(3, device=device), torch.full((3,), -math.inf, device=device)
    top_k, top_p = torch.full((3,), 4, dtype=torch.int32, device=device), torch.full((3,), 0.9, device=device)
    found = stay_thresholds_triton(
        logits, ones, top_k, top_p.double(), off, block=BLOCK, count_block=BLOCK, last_block=LAST_BLOCK
    )
    assert found[1] == COLUMNS - 3
    assert stays(logits, found)[2].nonzero().tolist() == [[5]]
