"""Kernels that meet their peers' kernels: processes stand for ranks, shared files for the GPUs' memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from headrace.kernels.all_reduce import all_reduce_reference
from headrace.kernels.draw_tokens import draw_tokens_reference
from headrace.kernels.mailbox import Layout, empty

from .peer_rank import ROUNDS, ROWS, SQUARED, layouts, logits, message, sizes

RANK = Path(__file__).with_name("peer_rank.py")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels run in the interpreter here; on GPUs tests/gpu has their like"
)


@pytest.mark.parametrize("size", [3])
def test_every_rank_gets_the_same_right_result(size: int, tmp_path: Path) -> None:
    for name, layout in layouts(size).items():
        for rank in range(size):
            path = str(tmp_path / f"memory-{name}-{rank}")
            empty(torch.from_file(path, True, layout.num_bytes, dtype=torch.uint8), layout.dtype)
    command = [sys.executable, str(RANK)]
    ranks = [
        subprocess.Popen([*command, str(rank), str(size), str(tmp_path)], stderr=subprocess.PIPE)
        for rank in range(size)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=250)
            assert process.returncode == 0, errors.decode()
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    results = [torch.load(tmp_path / f"results-{rank}") for rank in range(size)]
    for name, layout in layouts(size).items():
        for other in results[1:]:
            for ours, theirs in zip(results[0][name], other[name], strict=True):
                assert torch.equal(theirs, ours), f"{name}: the ranks differ"
        for turn in range(ROUNDS):
            ours = results[0][name][turn]
            if name == "winners":
                whole, seeds = logits(101, turn), torch.arange(ROWS)
                temperatures = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.7, 2.0])
                assert torch.equal(ours, draw_tokens_reference(whole, temperatures, seeds, seeds))
                continue
            partials = [message(rank, turn, sizes(turn), layout.dtype) for rank in range(size)]
            residual = message(-1, turn, sizes(turn), layout.dtype) if "float32" in name else None
            tolerance = 1e-6 if layout.dtype == torch.float32 else 2**-7
            expected = all_reduce_reference(partials, residual)
            torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance, msg=name)
        if name != "winners":
            check_squares(name, layout, size, *results[0][name][ROUNDS:])


def check_squares(name: str, layout: Layout, size: int, got: torch.Tensor, squares: torch.Tensor) -> None:
    """Of the rounded sums, block by block: two rows of 256 numbers."""
    rows, width = SQUARED
    partials = [message(rank, ROUNDS, rows * width, layout.dtype).view(SQUARED) for rank in range(size)]
    tolerance = 1e-6 if layout.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, all_reduce_reference(partials), atol=tolerance, rtol=tolerance, msg=name)
    exact = got.double().square().view(rows, -1, layout.block).sum(-1).t()
    torch.testing.assert_close(squares.double(), exact, rtol=1e-6, atol=0.0, msg=name)
