"""What scripts that measure GPUs say where there are none."""

from __future__ import annotations

import argparse

import torch


def require_gpus(parser: argparse.ArgumentParser, count: int = 1) -> None:
    """End the program, as for a wrong argument, where torch shows fewer than `count` GPUs."""
    found = torch.cuda.device_count()
    if found < count:
        parser.error(f"needs {count} GPU{'s' if count > 1 else ''}; torch shows {found}")
