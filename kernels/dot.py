"""Products of tiles that are exact to the type they add up in."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from .jit import INTERPRETED, tl, triton


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr) -> tl.tensor:
    """`total + a @ b`. PRECISION of float32: "ieee" rounds to no fewer bits, "tf32x3" to 21 or more, faster.

    The interpreter multiplies bfloat16 wrongly.
    """
    if INTERPRETED:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)
