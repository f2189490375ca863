"""A first start's kernels are compiled before they are launched, and nothing runs meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from headrace.worker.compiling import STEP, DryRun

COPY = "_copy_segments_kernel"


def compile_ahead(cache: Path) -> dict[str, Any]:
    script = Path(__file__).with_name("compile_ahead.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_a_first_start_compiles_kernels_ahead_and_a_second_finds_them(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia.compiler", reason="Triton is not installed here")
    first, second = compile_ahead(tmp_path), compile_ahead(tmp_path)
    assert first["ahead"] == second["ahead"] == [STEP, STEP, STEP, ""]  # two kernels
    assert first["again"] == [STEP, ""]
    assert second["again"] == []
    assert (first["launchers"], second["launchers"]) == (2, 0)
    for start in first, second:
        assert not start["written"]
        assert start["known"] == []
        assert start["new"] == [COPY, ""]
        assert start["raised"]  # where it is launched


def test_a_dry_run_writes_nothing_and_reads_no_indices() -> None:
    table, at = torch.arange(12.0).view(3, 4), torch.tensor([7, -9, 1 << 40])
    with torch.inference_mode(), DryRun("cpu"):
        rows = table.index_select(0, at)  # of rows that it does not have
        embedded = torch.nn.functional.embedding(at + 1, table)
        assert table[1].data_ptr() == table.data_ptr() + 16
        assert table.fill_(5.0) is table
        table[1] = 6.0
        table += 1
        table.index_put_((at,), rows)
        torch.mm(table, table.T, out=table[:, :3])
        product = torch.nn.functional.linear(table, table)
        new = torch.full((2,), 3)
    assert table.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert rows.tolist() == embedded.tolist() == [[0, 1, 2, 3]] * 3
    assert torch.equal(product, table @ table.T)
    assert new.tolist() == [3, 3]


def test_other_devices_go_on() -> None:
    numbers = torch.arange(3)
    with DryRun("cuda"):
        numbers += 1
        more = numbers * 2
    assert more.tolist() == [2, 4, 6]
