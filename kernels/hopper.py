"""What kernels of warpgroup instructions share: the names of Gluon, if there is Gluon, and descriptors.

Gluon is an experimental part of Triton, which may move; `AVAILABLE` says whether it is where it was.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    # Triton 3.6's names, and those that came after them.
    async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
except (ImportError, AttributeError):
    AVAILABLE = False
    async_load = barrier = None
    gluon = SimpleNamespace(
        jit=lambda function=None, **_: function or (lambda kernel: kernel),
        constexpr_function=lambda function: function,
    )
    gl = mbarrier = warpgroup_mma = warpgroup_mma_wait = fence_async_shared = TensorDescriptor = None
    gdc_wait = gdc_launch_dependents = None
else:
    AVAILABLE = True

__all__ = [
    "AVAILABLE",
    "TensorDescriptor",
    "async_load",
    "barrier",
    "descriptor",
    "fence_async_shared",
    "gdc_launch_dependents",
    "gdc_wait",
    "gl",
    "gluon",
    "is_hopper",
    "mbarrier",
    "multiplies",
    "shared_layout",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the instructions and bulk copies can take these matrices, but for their numbers of columns."""
    if not x.is_cuda or not is_hopper(x.device) or weight.data_ptr() % 16 or x.data_ptr() % 16:
        return False
    return x.element_size() == 2 and x.is_contiguous()  # they multiply 16 bit numbers


@cache
def is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


@cache
def shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> object:
    """Of a tile in shared memory."""
    element = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for(list(block), element)


def descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    """Of `tensor`, for copies of tiles of this shape."""
    layout = shared_layout(block, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block), layout)
