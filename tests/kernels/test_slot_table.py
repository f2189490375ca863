"""The slot table's kernels against their torch references: both change the same places in the same way."""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.copy_segments import copy_segments_reference, copy_segments_triton
from headrace.kernels.slot_table import (
    append_tokens_reference,
    append_tokens_triton,
    decode_inputs_reference,
    decode_inputs_triton,
    packed_inputs_reference,
    packed_inputs_triton,
)
from torch import Tensor

SLOTS, LENGTH, BLOCK_SIZE = 9, 64, 8


class Table:
    """A table whose lengths are a column among others."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.tokens = torch.randint(0, 1000, (SLOTS, LENGTH), dtype=torch.int32, device=device)
        self.blocks = torch.randint(0, 50, (SLOTS, LENGTH // BLOCK_SIZE), dtype=torch.int32, device=device)
        self.columns = torch.randint(0, LENGTH - 1, (SLOTS, 4), dtype=torch.int32, device=device)
        self.lengths = self.columns[:, 0]


def ints(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_decode_inputs(rows: int, device: torch.device) -> None:
    table = Table(device)
    slots = ints([i * 5 % SLOTS for i in range(rows)], device)
    arguments = slots, table.lengths, table.tokens, table.blocks, BLOCK_SIZE
    for ours, expected in zip(
        decode_inputs_triton(*arguments), decode_inputs_reference(*arguments), strict=True
    ):
        assert torch.equal(ours, expected)


def test_packed_inputs(device: torch.device) -> None:
    counts, starts, slots = [1, 19, 40, 5, 1], [5, 0, 3, 7, 0], [2, 0, 5, 8, 1]
    query_start = ints([0, *torch.tensor(counts).cumsum(0).tolist()], device)
    results: list[tuple[Tensor, ...]] = []
    for packed in (packed_inputs_triton, packed_inputs_reference):
        table = Table(device)
        inputs = packed(
            ints(slots, device),
            query_start,
            ints(starts, device),
            table.lengths,
            table.tokens,
            table.blocks,
            BLOCK_SIZE,
            sum(counts),
            max(counts),
        )
        results.append((*inputs, table.columns))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    lengths = results[0][-1][:, 0]
    assert lengths[5] == 43
    assert lengths[-1] == Table(device).lengths[-1]  # slot 8 is padding


@pytest.mark.parametrize(("step", "following"), [(2, 3), (3, 0)])
@pytest.mark.parametrize("rows", [1, 4, 1500])
def test_append_tokens_leaves_the_padding_alone(
    rows: int, step: int, following: int, device: torch.device
) -> None:
    slots = ints([3, 1, SLOTS - 1, SLOTS - 1][:rows] + [SLOTS - 1] * (rows - 4), device)
    ends = ints([9, 10, 1, 1][:rows] + [1] * (rows - 4), device)
    sampled = torch.arange(rows, device=device) + 1000
    results: list[tuple[Tensor, ...]] = []
    for append in (append_tokens_triton, append_tokens_reference):
        table = Table(device)
        reported, counter = torch.zeros(4, rows, dtype=torch.int32, device=device), ints([step], device)
        append(sampled, slots, ends, table.lengths, table.tokens, reported, counter)
        results.append((table.tokens, table.columns, reported, counter))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    tokens, columns, reported, counter = results[0]
    assert [int(tokens[3, 9]), int(columns[3, 0]), int(counter)] == [1000, 9, following]
    assert reported[step].tolist() == sampled.tolist()
    assert torch.equal(tokens[-1], Table(device).tokens[-1])


def test_copy_segments(device: torch.device) -> None:
    values = torch.randint(0, 1000, (5000,), dtype=torch.int32, device=device)
    segments = [(5, 12, 3), (50, 15, 1), (100, 16, 4900), (20, 4916, 0)]
    staged = torch.cat((ints([number for segment in segments for number in segment], device), values))
    ours, expected = (torch.zeros(6000, dtype=torch.int32, device=device) for _ in range(2))
    copy_segments_triton(ours, staged, len(segments), 4900)
    copy_segments_reference(expected, staged, len(segments), 4900)
    assert torch.equal(ours, expected)
    assert ours[100:5000].tolist() == values[4:4904].tolist()
