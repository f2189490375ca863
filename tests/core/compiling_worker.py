"""The oracle's worker, each of whose steps has Triton compile a kernel, as a GPU's first steps do: an entry.

The kernel is for an H200, so it is not run. What assembles it may take its time (TRITON_PTXAS_PATH).
"""

from __future__ import annotations

from headrace.kernels.copy_segments import _copy_segments_kernel
from headrace.worker import main
from headrace.worker.compiling import Compiler
from headrace.worker.in_order import Executed, InOrder
from headrace.worker.oracle import OracleBackend
from headrace.worker.slots import Batch, Slots
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor


class NoDevice:
    """What Triton asks of a GPU's driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompilingOracle(OracleBackend):
    """Compiles for one more block size in every step."""

    _block = 1024

    def execute(self, slots: Slots, batch: Batch) -> Executed:
        self._block *= 2
        staged = MockTensor("i32")
        _copy_segments_kernel.warmup(staged, staged, BLOCK=self._block, grid=(1,))
        return super().execute(slots, batch)


class CompilingWorker(main.Worker):
    """Tells of it as a GPU's worker does."""

    def _make_runner(self) -> InOrder:
        driver.set_active(NoDevice())
        Compiler(self._compile)
        return InOrder(self._start.config, CompilingOracle(self._start.config))


def run(payload: bytes) -> None:
    main.Worker = CompilingWorker  # type: ignore[misc]
    main.run(payload)
