"""A process that compiles for an H200 and has none: prints what its compiler told."""

from __future__ import annotations

import json

import torch
from headrace.kernels.copy_segments import _copy_segments_kernel
from headrace.worker.compiling import Compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import CompilationError
from triton.runtime.driver import driver

BROKEN = 48
"""Blocks are powers of two."""


class NoDevice:
    """What Triton asks of a GPU's driver, but to launch anything."""

    def __init__(self) -> None:
        self.launchers: list[str] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, src: object, metadata: object) -> None:
        self.launchers.append(type(src).__name__)


def main() -> None:
    device = NoDevice()
    driver.set_active(device)
    told: list[str] = []
    compiler = Compiler(told.append)
    tensor = torch.zeros(1024, dtype=torch.int32)

    def heard() -> list[str]:
        names = told.copy()
        told.clear()
        return names

    def launch() -> None:
        for block in (64, 128, 64, BROKEN):
            _copy_segments_kernel[(1,)](tensor, tensor, BLOCK=block)
        tensor.fill_(1)

    def fail() -> None:
        launch()
        raise ValueError("a dry run may go wrong where the real one does not")

    compiler.ahead(launch, tensor.device)
    ahead = heard()
    for block in (64, 128):
        _copy_segments_kernel.warmup(tensor, tensor, BLOCK=block, grid=(1,))
    known = heard()
    compiler.ahead(fail, tensor.device)
    again = heard()
    _copy_segments_kernel.warmup(tensor, tensor, BLOCK=256, grid=(1,))
    new = heard()
    raised = False
    try:
        _copy_segments_kernel.warmup(tensor, tensor, BLOCK=BROKEN, grid=(1,))
    except CompilationError:
        raised = True
    print(
        json.dumps(
            {
                "ahead": ahead,
                "known": known,
                "again": again,
                "new": new,
                "raised": raised,
                "launchers": len(device.launchers),
                "written": bool(tensor.any()),
            }
        )
    )


if __name__ == "__main__":
    main()
