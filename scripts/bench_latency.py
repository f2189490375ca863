"""How long one batch takes, from handing it over to its last token. vLLM's default latency workload:
8 requests of 32 random tokens, 128 tokens each, temperature 1; 10 iterations to warm up, 30 measured.

    python scripts/bench_latency.py --model demo --compare headrace,transformers
    python scripts/bench_latency.py --batch-size 1 --load-format dummy --model FOLDER_WITH_CONFIG_JSON

What bounds it: at small batches, reading the weights once a step.
"""

from __future__ import annotations

import argparse
import random

from benchlib.engines import Request, random_prompt, started
from benchlib.harness import Figures, percentiles, run_benchmark


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--warmup-iters", type=int, default=10)
    parser.add_argument("--iters", type=int, default=30)


def measure(args: argparse.Namespace) -> Figures:
    rng = random.Random(args.seed)

    def batch() -> list[Request]:
        return [Request(random_prompt(rng, args.input_len), args.output_len) for _ in range(args.batch_size)]

    with started(args, enable_prefix_caching=False) as engine:
        for _ in range(args.warmup_iters):
            engine.run(batch())
        runs = [engine.run(batch()) for _ in range(args.iters)]
    traces = [trace for run in runs for trace in run]
    latencies = [max(t.outputs[-1][0] for t in run) - min(t.begun for t in run) for run in runs]
    latency = sum(latencies) / len(latencies)
    return {
        "per token, ms": 1000 * latency / args.output_len,
        "output tokens/s": args.batch_size * args.output_len / latency,
        **percentiles("batch", latencies, (10, 25, 50, 75, 90, 99)),
        **percentiles("first token", (trace.ttft for trace in traces)),
        **percentiles("between tokens", (gap for trace in traces for gap in trace.gaps)),
    }


if __name__ == "__main__":  # vLLM imports the main module again in its children
    run_benchmark(__doc__, measure, add_flags)
