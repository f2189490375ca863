"""CUDA graphs of decode steps, one for every batch size that is worth one, recorded when there is time.

A replay costs the host one call, whatever the model. Knows batch sizes and recording; what is recorded is a
function of the batch size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")

_EVERY_SIZE = 32
_STEP = 8
_STRETCH = 2
"""A step may run padded to so many times its size rather than wait for a recording."""
PATIENCE = 32
"""So many steps of a size run padded before it is recorded under load: padding has cost as much by then."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Every size to 32, then every 8th; the last holds `max_num_seqs`."""
    sizes = list(range(1, min(_EVERY_SIZE, max_num_seqs) + 1))
    return sizes + list(range(_EVERY_SIZE + _STEP, max_num_seqs + _STEP, _STEP))


def most_useful(sizes: list[int]) -> list[int]:
    """A few of the sizes, within reach of which every other one is, and the largest."""
    return [*(size for size in sizes if size & (size - 1) == 0), sizes[-1]]


class Recorder:
    """Records CUDA graphs, all with one pool of memory: they never run at the same time.

    `alone` makes a context in which kernels neither send anything to other ranks nor wait for them: these
    rehearse at another time, or not at all. `compile_ahead` compiles what a function launches, and launches
    nothing.
    """

    def __init__(
        self,
        alone: Callable[[], AbstractContextManager[None]],
        compile_ahead: Callable[[Callable[[], None]], None],
    ) -> None:
        self._alone, self._compile_ahead = alone, compile_ahead
        self._pool: Any = None
        self._stream = torch.cuda.Stream()

    def record(self, run: Callable[[], Result], rehearse: Callable[[], None]) -> Recording[Result]:
        """What `run` launches. `rehearse` launches the same once for real: kernels are compiled and loaded,
        which a recording must not do.
        """
        self._compile_ahead(rehearse)
        with self._alone():
            rehearse()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: that empties the allocator's cache, and the next prompts would pay for it.
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            result = run()
            graph.capture_end()
        self._pool = graph.pool()
        return Recording(graph, result)


@dataclass(frozen=True, slots=True)
class Recording(Generic[Result]):
    """A graph, and what the recorded function returned: tensors that every replay fills anew."""

    graph: torch.cuda.CUDAGraph
    result: Result

    def replay(self) -> Result:
        self.graph.replay()
        return self.result


class Graphs(Generic[Result]):
    """Recordings of `step(size)`, which launches the same work on the same tensors whenever it is called.

    A recording serves when `use` says so, and not before: which ones serve must be the same on all ranks.
    """

    def __init__(
        self,
        recorder: Recorder,
        step: Callable[[int], Result],
        rehearse: Callable[[int], None],
        sizes: list[int],
    ) -> None:
        self._recorder = recorder
        self._step = step
        self._rehearse = rehearse
        self._sizes = sizes
        self._recorded: dict[int, Recording[Result]] = {}
        self._in_use: set[int] = set()
        self._num_padded = dict.fromkeys(sizes, 0)

    def run(self, rows: int) -> Result:
        """Launch the step for at least `rows` rows, recording it first if nothing near is in use or what is
        near has served for it too often. All ranks run the same steps, so they record the same.
        """
        size = next(size for size in self._sizes if size >= rows)
        if size not in self._in_use and self._num_padded[size] < PATIENCE:
            self._num_padded[size] += 1
            larger = (s for s in self._sizes if size < s <= _STRETCH * size and s in self._in_use)
            size = next(larger, size)
        self.record(size)
        self.use(size)
        return self._recorded[size].replay()

    def record(self, size: int) -> None:
        """Record the step of `size` rows, unless that is done."""
        if size not in self._recorded:
            self._recorded[size] = self._recorder.record(
                lambda: self._step(size), lambda: self._rehearse(size)
            )

    def use(self, size: int) -> None:
        """`run` may from now on take this recording."""
        self._in_use.add(size)
