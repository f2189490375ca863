"""Products of tiles that are exact to the type they add up in."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from .jit import INTERPRETED, tl, triton


@triton.jit
def dot(a, b, total) -> tl.tensor:
    """The interpreter multiplies bfloat16 wrongly. float32 is not rounded to fewer bits."""
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, total, input_precision="ieee")
