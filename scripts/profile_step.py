"""Where a decode step's time goes on the GPU: a table per kernel, the idle gap between steps, and a trace.

    python scripts/profile_step.py --model scripts/models/llama-3.2-1b [--cases 1x64 128x64] [--trace FILE]

A case is so many requests with so many tokens of context. With --tensor-parallel-size the other ranks run in
processes of their own, each with the same scheduler's same plans; rank 0 is profiled.

Runs one worker's runner in this process with two plans in flight, as the engine does, without frontend and
core. `step` is measured without the profiler. Kernels that are launched early (programmatic dependent launch)
overlap: their times then add up to more than the GPU's. Open the trace in Perfetto or chrome://tracing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchlib.gpus import require_gpus
from benchlib.made_up_tokenizer import make_tokenizer
from headrace.core.request import Request
from headrace.core.scheduler import Scheduler
from headrace.frontend.engine_args import AsyncEngineArgs, resolve
from headrace.ipc.messages import Sampling
from headrace.worker.cuda_runner import CudaRunner
from torch.profiler import ProfilerActivity, profile

_FIRST_KERNEL = "_decode_inputs_kernel"


class Driver:
    """The core's and the worker's loops in one."""

    def __init__(self, args: argparse.Namespace, batch_size: int, context: int) -> None:
        length = context + args.steps * 3 + 64
        num_blocks = batch_size * -(-length // 16)  # the same on all ranks
        config = resolve(
            AsyncEngineArgs(
                model=args.model,
                tokenizer=args.tokenizer,
                tensor_parallel_size=args.tensor_parallel_size,
                block_size=16,
                num_gpu_blocks_override=num_blocks,
                load_format="dummy",
                skip_tokenizer_init=not args.grammar,
                max_num_seqs=max(batch_size, 8),
                max_num_batched_tokens=16384,
                max_model_len=length,
                enforce_eager=args.enforce_eager,
                batch_invariant=args.batch_invariant,
                enable_prefix_caching=False,
            )
        )
        self.runner = CudaRunner(config, args.rank, f"{args.rendezvous}-{batch_size}-{context}")
        self.runner.load(lambda phase: None)
        self.runner.allocate(num_blocks, config.max_model_len)
        self.runner.warm_up()
        self._scheduler = Scheduler(config, num_blocks, config.max_model_len)
        sampling = Sampling(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, grammar=args.grammar
        )
        for number in range(batch_size):
            prompt = array("i", (i % 1000 for i in range(number, number + context)))
            self._scheduler.add(Request(b"", number, prompt, sampling, args.steps * 3 + 32))
        self._under_way: deque[Any] = deque()
        self.host: list[float] = []
        """Seconds that each submission took."""

    def step(self) -> None:
        """Keep two plans in flight, take in one result."""
        while (plan := self._scheduler.schedule(0.0)) is not None:
            begun = time.perf_counter()
            self._under_way.append(self.runner.submit(plan))
            self.host.append(time.perf_counter() - begun)
        pending = self._under_way.popleft()
        while not pending.ready():
            pass
        self._scheduler.update(pending.result())
        if self._under_way:  # as a worker does: it may now be possible to draw
            self._under_way[0].ready()


def kernels_of(trace: Any) -> list[tuple[str, float, float]]:
    """(name, begin, end) in microseconds of everything that ran on the GPU, in order."""
    found = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in trace.events()
        if str(event.device_type).endswith("CUDA")
    ]
    return sorted(found, key=lambda kernel: kernel[1])


def table(kernels: Sequence[tuple[str, float, float]], steps: int) -> None:
    total: dict[str, list[float]] = {}
    for name, begin, end in kernels:
        total.setdefault(name, []).append(end - begin)
    print(f"{'kernel':<70}{'per step':>10}{'us each':>10}{'us / step':>12}")
    for name, times in sorted(total.items(), key=lambda item: -sum(item[1])):
        each = statistics.mean(times)
        print(f"{name[:69]:<70}{len(times) / steps:>10.1f}{each:>10.2f}{sum(times) / steps:>12.1f}")


def gaps(kernels: Sequence[tuple[str, float, float]]) -> list[float]:
    """Microseconds from the end of everything before to the first kernel of each step."""
    found: list[float] = []
    latest = 0.0
    for name, begin, end in kernels:
        if name == _FIRST_KERNEL and latest:
            found.append(max(0.0, begin - latest))
        latest = max(latest, end)
    return found


def profile_case(args: argparse.Namespace, batch_size: int, context: int) -> dict[str, float]:
    """Print the case's table; returns its figures."""
    driver = Driver(args, batch_size, context)
    for _ in range(20):
        driver.step()
    driver.host.clear()
    begun = time.perf_counter()
    for _ in range(args.steps):
        driver.step()
    wall = (time.perf_counter() - begun) / args.steps
    if args.rank:
        for _ in range(args.steps):
            driver.step()
        return {}
    host = statistics.median(driver.host)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(args.steps):
            driver.step()
        torch.cuda.synchronize()
    kernels = kernels_of(trace)
    if args.trace:
        trace.export_chrome_trace(args.trace)
    print(f"\n{args.model}: {batch_size} x {context}")
    table(kernels, args.steps)
    busy, covered = 0.0, 0.0
    for _, begin, end in kernels:  # kernels overlap where one is launched before the last has ended
        busy += max(0.0, end - max(begin, covered))
        covered = max(covered, end)
    idle = sorted(gaps(kernels))
    figures = {
        "step, ms": 1000 * wall,
        "GPU busy per step, ms": busy / args.steps / 1000,
        "gap between steps p50, us": idle[len(idle) // 2],
        "gap between steps p90, us": idle[len(idle) * 9 // 10],
        "host per submission, us": 1e6 * host,
    }
    for name, value in figures.items():
        print(f"{name:<30}{value:>12.3f}")
    return figures


def case(text: str) -> tuple[int, int]:
    batch_size, _, context = text.partition("x")
    return int(batch_size), int(context)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--cases", nargs="+", type=case, default=[(1, 64)], metavar="BATCHxCONTEXT")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--grammar", help="that texts follow, as Lark or as llguidance's JSON")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--trace", metavar="FILE", help="write a trace of the last case for Perfetto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    args = parser.parse_args()
    require_gpus(parser, args.tensor_parallel_size)
    with tempfile.TemporaryDirectory() as folder:
        args.rendezvous = args.rendezvous or f"{folder}/ranks"
        args.tokenizer = None
        if args.grammar and not (Path(args.model) / "tokenizer.json").is_file():
            args.tokenizer = folder
            config = json.loads((Path(args.model) / "config.json").read_text())
            make_tokenizer(Path(folder), config["vocab_size"])
        others = range(1, 1 if args.rank else args.tensor_parallel_size)
        command = [sys.executable, *sys.argv, "--rendezvous", args.rendezvous, "--rank"]
        peers = [subprocess.Popen([*command, str(rank)]) for rank in others]
        try:
            profile_cases(args)
        finally:
            for peer in peers:
                peer.kill()
                peer.wait()


def profile_cases(args: argparse.Namespace) -> None:
    results = {}
    for batch_size, context in args.cases:
        results[f"{batch_size} x {context}"] = profile_case(args, batch_size, context)
        gc.collect()
        torch.cuda.empty_cache()
    if args.rank == 0:
        print(json.dumps({"benchmark": "profile_step", "settings": vars(args), "results": results}))


main()
