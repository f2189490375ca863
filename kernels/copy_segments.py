"""Scatter short runs of integers from one staging buffer into a large array: all of a step's updates at once.

An engine step changes a few rows of several tables (block tables, tokens, sampling parameters). Kept in one
array, all changes are one upload and one launch, whatever their number.
"""

from __future__ import annotations

from torch import Tensor

from .jit import tl, triton

_BLOCK = 1024
"""Values copied by one program at a time: a prompt is a few programs, a granted block one."""


def copy_segments(target: Tensor, staged: Tensor, count: int, longest: int) -> None:
    """Copy `count` segments of `staged` to their places in `target`.

    Args:
        target: int32 [size], size < 2**31.
        staged: int32; first `count` triples (place in `target`, place in `staged`, length), then the values.
            Segments must not overlap in `target`.
        longest: at least the largest length.
    """
    copy = copy_segments_triton if target.is_cuda else copy_segments_reference
    copy(target, staged, count, longest)


def copy_segments_triton(target: Tensor, staged: Tensor, count: int, longest: int) -> None:
    """`copy_segments` in one launch."""
    grid = (count, min(triton.cdiv(longest, _BLOCK), 64))
    _copy_segments_kernel[grid](target, staged, BLOCK=_BLOCK, num_warps=4)


@triton.jit  # type: ignore[untyped-decorator]
def _copy_segments_kernel(target_ptr, staged_ptr, BLOCK: tl.constexpr) -> None:
    entry = staged_ptr + tl.program_id(0) * 3
    to = tl.load(entry)
    source = tl.load(entry + 1)
    length = tl.load(entry + 2)
    for start in range(tl.program_id(1) * BLOCK, length, tl.num_programs(1) * BLOCK):
        offset = start + tl.arange(0, BLOCK)
        inside = offset < length
        values = tl.load(staged_ptr + source + offset, mask=inside)
        tl.store(target_ptr + to + offset, values, mask=inside)


def copy_segments_reference(target: Tensor, staged: Tensor, count: int, longest: int) -> None:
    """`copy_segments` in torch, one copy at a time."""
    table: list[list[int]] = staged[: 3 * count].view(count, 3).tolist()
    for to, source, length in table:
        target[to : to + length] = staged[source : source + length]
