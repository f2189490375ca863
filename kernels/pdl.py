"""Programmatic dependent launch: a kernel starts while the one before it on the stream still runs.

A kernel launched with `launch_pdl=True` may start as soon as every program of its predecessor has called
`allow_next` or ended. What it reads or writes of an earlier kernel's work comes after `wait_previous`, which
returns when the predecessor has ended and its writes are visible. Rules for a chain of such kernels:

- Each kernel calls `wait_previous`, even if it needs nothing: the end of a kernel then implies the end of all
  kernels before it.
- `wait_previous` stands before any pipelined loop; inside one it is miscompiled.
- Weights, which no kernel writes, may be loaded above the wait: that is the point.
- A kernel launched without the option (cuBLAS) waits for everything before it.

Measured on an H200 in a CUDA graph: a dependent kernel costs 0.68 us with, 1.14 us without.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .jit import tl, triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def wait_previous(PDL: tl.constexpr) -> None:
    """Wait for the kernels before this one. PDL is false where kernels are interpreted."""
    if PDL:
        gdc_wait()


@triton.jit
def allow_next(PDL: tl.constexpr) -> None:
    """Let the next kernel start once all programs of this one have come here."""
    if PDL:
        gdc_launch_dependents()


def pdl_options(tensor: Tensor) -> dict[str, Any]:
    """Launch arguments: PDL where the GPU has it (compute capability 9.0), not in the interpreter."""
    if tensor.is_cuda and _has_pdl(tensor.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@cache
def _has_pdl(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9
