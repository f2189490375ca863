"""Times of replayed CUDA graphs, and tables of them."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
import triton

BYTES_PER_US = 4.3e6
"""The floor's memory speed, 4.3 TB/s: what a plain read of the weights reaches on an H200."""

Call: TypeAlias = Callable[[], object]
Row: TypeAlias = dict[str, Any]


def graph_us(run: Call, repeats: int = 20) -> float:
    """Microseconds of one replay of `run`: the median of five timings of `repeats` replays each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(5):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(repeats):
            graph.replay()
        ended.record()
        ended.synchronize()
        times.append(float(begun.elapsed_time(ended)) * 1e3 / repeats)
    return statistics.median(times)


@contextlib.contextmanager
def compiled_in_parallel() -> Iterator[None]:
    """Inside, kernel launches only compile, on all cores at once; results are garbage."""
    function: Any = triton.runtime.jit.JITFunction
    launch = function.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    function.run = warm_up
    try:
        with ThreadPoolExecutor(16) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        function.run = launch


def report(title: str, rows: list[Row]) -> None:
    """Print rows of equal keys as a table."""
    if not rows:
        return
    text = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    table = [list(rows[0]), *text]
    widths = [max(len(line[i]) for line in table) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
