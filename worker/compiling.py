"""Tells when Triton compiles a kernel: seconds of a step that bring no token and yet are progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..kernels.jit import triton


def tell_of_compiling(tell: Callable[[str], None]) -> None:
    """From now on call `tell` with the name of each kernel that this process compiles, and with "" when it is
    compiled. Also where Triton finds it in its cache on disk, which takes milliseconds. A compilation that
    fails raises, and has no end.
    """

    def before(*, fn: Any, **_: Any) -> bool:
        tell(fn.name)
        return False  # do compile

    def after(**_: Any) -> None:
        tell("")

    triton.knobs.runtime.jit_cache_hook = before
    triton.knobs.runtime.jit_post_compile_hook = after
