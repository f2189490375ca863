"""How fast an engine is there, and what it costs while it waits.

    python scripts/bench_startup.py [--engine vllm] [--idle-seconds 10]

The times of `import` and `--help` are those of fresh processes. Memory is the resident set of each process
after a few requests; idle CPU is the share of one core that each uses while nothing is asked of the engine.
First tokens are medians, of requests one after another and of requests after a fifth of the idle time each.
Processors that have rested are slow at first, whatever they do: what that costs a plain function, which waits
for nobody, stands beside them.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from benchlib.engines import Request, random_prompt, started
from benchlib.harness import Figures, run_benchmark

_SOURCE = Path(__file__).read_text()
_IMPORTS = {
    "headrace": "import headrace; headrace.AsyncLLM",
    "vllm": "from vllm.v1.engine.async_llm import AsyncLLM",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--idle-seconds", type=float, default=10.0)


def measure(args: argparse.Namespace) -> Iterator[Figures]:
    rng = random.Random(args.seed)
    begun = time.perf_counter()
    with started(args) as engine:
        yield {"start to ready, s": time.perf_counter() - begun}
        (trace,) = engine.run([Request(random_prompt(rng, 8), 1)])
        yield {"start to first token, s": trace.outputs[0][0] - begun}
        yield _idle(args.idle_seconds)

        def first_token() -> float:
            return engine.run([Request(random_prompt(rng, 8), 1)])[0].ttft

        yield _rested("first token", first_token, args.idle_seconds)
        yield _rested("a plain function", _work, args.idle_seconds)
    yield {"import AsyncLLM, s": _wall([sys.executable, "-c", _IMPORTS[args.engine]])}
    yield {"--help, s": _wall([str(Path(sys.executable).with_name(args.engine)), "--help"])}


def _idle(seconds: float) -> Figures:
    """Memory now, and the CPU that each process uses while nothing is asked."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    before = [sum(process.cpu_times()[:2]) for process in processes]
    time.sleep(seconds)
    figures: Figures = {}
    for number, (process, used) in enumerate(zip(processes, before, strict=True)):
        name = "frontend" if process.pid == os.getpid() else f"process {number}"
        figures[f"memory: {name}, MB"] = process.memory_info().rss / 1e6
        figures[f"idle CPU: {name}, %"] = 100 * (sum(process.cpu_times()[:2]) - used) / seconds
    return figures


def _rested(name: str, measure: Callable[[], float], idle_seconds: float) -> Figures:
    """Medians of what `measure` says (seconds): 20 times in a row, and 5 times after a pause."""
    warm = [measure() for _ in range(20)]
    rested: list[float] = []
    for _ in range(5):
        time.sleep(idle_seconds / 5)
        rested.append(measure())
    return {
        f"{name}, warm, ms": 1000 * statistics.median(warm),
        f"{name}, after idling, ms": 1000 * statistics.median(rested),
    }


def _work() -> float:
    """Seconds of something that needs the caches as a request does: about a millisecond."""
    begun = time.perf_counter()
    ast.parse(_SOURCE)
    return time.perf_counter() - begun


def _wall(command: list[str]) -> float:
    """Seconds that a command takes, the better of two runs: the first may have bytecode to write."""
    seconds: list[float] = []
    for _ in range(2):
        begun = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


if __name__ == "__main__":  # vLLM imports the main module again in its children
    run_benchmark(__doc__, measure, add_flags, engines=("headrace", "vllm"))
