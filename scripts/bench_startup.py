"""How fast an engine is there, and what it costs while it waits.

    python scripts/bench_startup.py [--engine vllm] [--idle-seconds 10]

The times of `import` and `--help` are those of fresh processes. Memory is the resident set of each process
after a few requests; idle CPU is the share of one core that each uses while nothing is asked of the engine.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
from benchlib.engines import Request, random_prompt, started
from benchlib.harness import Figures, run_benchmark

_IMPORTS = {
    "headrace": "import headrace; headrace.AsyncLLM",
    "vllm": "from vllm.v1.engine.async_llm import AsyncLLM",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--idle-seconds", type=float, default=10.0)


def measure(args: argparse.Namespace) -> Figures:
    rng = random.Random(args.seed)
    begun = time.perf_counter()
    with started(args) as engine:
        figures = {"start to ready, s": time.perf_counter() - begun}
        (trace,) = engine.run([Request(random_prompt(rng, 8), 1)])
        figures["start to first token, s"] = trace.outputs[0][0] - begun
        warm = [engine.run([Request(random_prompt(rng, 8), 1)])[0].ttft for _ in range(20)]
        figures["first token, warm, ms"] = 1000 * min(warm)
        figures |= _idle(args.idle_seconds)
        (trace,) = engine.run([Request(random_prompt(rng, 8), 1)])
        figures["first token after idling, ms"] = 1000 * trace.ttft
    figures["import AsyncLLM, s"] = _wall([sys.executable, "-c", _IMPORTS[args.engine]])
    figures["--help, s"] = _wall([str(Path(sys.executable).with_name(args.engine)), "--help"])
    return figures


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
