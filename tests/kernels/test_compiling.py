"""Kernels compile with this Triton for the GPU that they are tuned for; the interpreter knows no Gluon."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def test_kernels_compile_for_an_h200(tmp_path: Path) -> None:
    pytest.importorskip("triton.backends.nvidia.compiler", reason="Triton is not installed here")
    script = Path(__file__).with_name("compile_for_h200.py")
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["failed"] == {}
    sources = "".join(path.read_text() for path in KERNELS.glob("*.py"))
    assert found["compiled"] == sorted(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))
    # Another form for every alignment of a size would be compiled while requests wait.
    assert set(found["forms"].values()) == {1}, found["forms"]
