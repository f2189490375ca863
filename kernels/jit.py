"""Triton, or a stand-in that lets the kernel files be imported where it is not installed.

The stand-in cannot launch anything: CPU tensors go to the torch references, and CUDA builds of torch bring
Triton.
"""

from __future__ import annotations

import os
from typing import Any

# What kernels are tuned and tested with: Triton 3.9 warns where nobody has said it, 3.10 is to turn it off.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl
except ImportError:

    class _NoTriton:
        constexpr = None

        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return (lambda each: each) if function is None else function

    triton = tl = _NoTriton()
    INTERPRETED = False
else:
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter, whose products of bfloat16 are wrong."""

__all__ = ["INTERPRETED", "tl", "triton"]
