"""What the engine itself costs for each step: many readers stream from a model that costs nothing.

    python scripts/bench_oracle.py [--num-requests 256] [--output-len 512] [--no-detokenize]

`load_format="oracle"` replaces the network by a hash, so what remains is the frontend (256 streams on uvloop,
detokenization included), the core, the worker's protocol, and the three processes' share of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from typing import Any

import psutil
import uvloop
from benchlib.engines import random_prompt
from benchlib.harness import Figures, run_benchmark
from headrace import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=512)
    parser.add_argument("--no-detokenize", action="store_true", help="token ids only")


def cpu_seconds() -> dict[str, float]:
    """CPU time of this process and of all below it, by what it runs."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {_role(process): sum(process.cpu_times()[:2]) for process in processes}


def _role(process: psutil.Process) -> str:
    words = process.cmdline()
    roles = {"headrace.core.main:run": "core", "headrace.worker.main:run": "worker"}
    role = next((role for entry, role in roles.items() if entry in words), None)
    return role or ("frontend" if process.pid == os.getpid() else f"process {process.pid}")


async def stream_all(engine: AsyncLLM, args: argparse.Namespace) -> Figures:
    """Steps are counted on one stream, from its tenth part to its last but one, when all are decoding."""
    rng = random.Random(args.seed)
    detokenize = not args.no_detokenize
    marks: list[tuple[int, float, dict[str, float]]] = []
    limits = [args.output_len // 10, args.output_len * 9 // 10]

    async def read(number: int) -> int:
        params = SamplingParams(
            max_tokens=args.output_len,
            ignore_eos=True,
            detokenize=detokenize,
            seed=number,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt: Any = {"prompt_token_ids": random_prompt(rng, args.input_len)}
        tokens = outputs = 0
        async for output in engine.generate(prompt, params, f"oracle-{number}"):
            tokens += len(output.outputs[0].token_ids)
            outputs += 1
            if number == 0 and len(marks) < 2 and tokens >= limits[len(marks)]:
                marks.append((tokens, time.perf_counter(), cpu_seconds()))
        return outputs

    outputs = await asyncio.gather(*map(read, range(args.num_requests)))
    (first, begun, before), (last, ended, after) = marks
    steps = last - first
    used = {role: 1000 * (after[role] - before[role]) / steps for role in after}
    return {
        "wall per step, ms": 1000 * (ended - begun) / steps,
        **{f"CPU per step: {role}, ms": used[role] for role in sorted(used)},
        "CPU per step: all, ms": sum(used.values()),
        "tokens per output": args.num_requests * args.output_len / sum(outputs),
    }


def measure(args: argparse.Namespace) -> Figures:
    engine_args = AsyncEngineArgs(
        model=args.model,
        load_format="oracle",
        max_num_seqs=args.max_num_seqs or args.num_requests,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        skip_tokenizer_init=args.no_detokenize,
    )

    async def run() -> Figures:
        async with AsyncLLM.from_engine_args(engine_args) as engine:
            return await stream_all(engine, args)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


if __name__ == "__main__":  # vLLM imports the main module again in its children
    run_benchmark(__doc__, measure, add_flags, engines=("headrace",))
