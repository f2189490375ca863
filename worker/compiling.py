"""Kernels that Triton must compile: seconds that bring no token and yet are progress; and many at once.

A first start on a machine has dozens to compile, one where each is first launched. `Compiler.ahead` names
those of a step by running it without launching anything, and compiles them side by side.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..kernels.jit import triton

LOGGER = logging.getLogger(__name__)
STEP = "a step's kernels"
"""What is being compiled inside `Compiler.ahead`."""
_THREADS = 8
"""A fifth of the work is Python, for which they queue; the rest is LLVM's, the assembler's and gcc's."""


class Compiler:
    """This process's compilations of kernels. Make one, in the thread that launches kernels."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with the name of what is to be compiled, a kernel or `STEP` (once more for each of its
        kernels that is done), and with "" when that is done. Also where Triton finds it in its cache on disk,
        which takes milliseconds. A compilation that fails raises, and has no end.
        """
        self._tell = tell
        self._is_ahead = False
        self._is_first_start: bool | None = None
        """Some kernel was not in the cache on disk; None: there has been none to look for."""
        triton.knobs.runtime.jit_cache_hook = self._before
        triton.knobs.runtime.jit_post_compile_hook = self._after
        triton.knobs.compilation.listener = self._compiled

    def ahead(self, launch: Callable[[], None], device: torch.device) -> None:
        """Have threads compile the kernels that `launch` launches, and launch none. Tensors on `device` stay
        as they are: see `DryRun`.

        What this misses is compiled where it is launched; what cannot be compiled raises there. Does nothing
        after a call that has found everything on disk, until a launch does not.
        """
        if self._is_first_start is False:
            return
        self._is_first_start = bool(self._is_first_start)
        functions: Any = triton.runtime.jit.JITFunction
        run = functions.run

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return run(function, *args, grid=grid, warmup=True, **options)

        self._tell(STEP)
        self._is_ahead, functions.run = True, compile_only
        try:
            with (
                ThreadPoolExecutor(_THREADS, "compile") as threads,
                triton.AsyncCompileMode(threads, ignore_errors=True),
                DryRun(device.type),
            ):
                launch()
        except Exception:
            LOGGER.warning("a step's kernels are compiled one at a time", exc_info=True)
        finally:
            self._is_ahead, functions.run = False, run
        self._tell("")

    def _before(self, *, fn: Any, **_: Any) -> bool:
        if not self._is_ahead:
            self._tell(fn.name)
        return False  # do compile

    def _after(self, **_: Any) -> None:
        self._tell(STEP if self._is_ahead else "")

    def _compiled(self, *, src: Any, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        """In the thread that did it."""
        if cache_hit:
            return
        self._is_first_start = True
        if self._is_ahead:
            # Also the C library that launches it, into the cache: a third of the work.
            triton.runtime.driver.active.launcher_cls(src, SimpleNamespace(**metadata))


class DryRun(TorchDispatchMode):
    """Inside, tensors on a type of device may hold anything, as kernels that should have filled them were not
    launched. Operations write to none of them, and read zeros instead of integers, which may be indices.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or the first operation imports torch._dynamo, which takes seconds

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._type = device_type

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = args, kwargs or {}
        if func._schema.is_mutable and any(self._is_here(each) for each in tree_leaves(given)):
            return given[1].get("out", args[0])
        if all(argument.alias_info is None for argument in func._schema.arguments):  # no view
            given = tree_map_only(Tensor, self._safe, given)
        return func(*given[0], **given[1])

    def _is_here(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.device.type == self._type

    def _safe(self, tensor: Tensor) -> Tensor:
        is_number = tensor.is_floating_point() or not self._is_here(tensor)
        return tensor if is_number else torch.zeros_like(tensor)
