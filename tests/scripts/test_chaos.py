"""The long test of faults, in short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chaos.py"


def test_streams_survive_a_few_seconds_of_faults() -> None:
    """64 oracle streams; workers and the core are killed at random points."""
    flags = ["--seconds", "8", "--faults", "kill-worker,kill-core", "--seed", "3"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=200, check=False
    )
    told = json.loads(done.stdout.splitlines()[-1])
    streams = told["streams"]
    assert streams["exact"] > 0
    bad = ("lost", "doubled", "changed", "lost blocks", "false alarms")
    assert [streams[name] for name in bad] == [0] * len(bad)
    assert sum(fault["injected"] for fault in told["faults"].values()) > 0
