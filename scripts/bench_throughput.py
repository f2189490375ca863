"""How many tokens a second the engine brings when everything is asked for at once.

    python scripts/bench_throughput.py --workload nano --model demo [--num-requests N]

Workloads: `nano` is nano-vllm's (256 requests, 100 to 1024 tokens in and out, temperature 0.6); `random` is
vLLM's default (1000 requests, 1024 tokens in, 128 out, temperature 1).
"""

from __future__ import annotations

import argparse
import random

from benchlib.engines import Request, random_prompt, started
from benchlib.harness import Figures, percentiles, run_benchmark


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workload", choices=("nano", "random"), default="nano")
    parser.add_argument("--num-requests", type=int, help="instead of the workload's number")
    parser.add_argument("--input-len", type=int, help="instead of the workload's, the same for all")
    parser.add_argument("--output-len", type=int, help="instead of the workload's, the same for all")


def workload(args: argparse.Namespace) -> list[Request]:
    rng = random.Random(args.seed)
    nano = args.workload == "nano"
    low, high = (100, 1024) if nano else (1024, 1024)
    requests: list[Request] = []
    for _ in range(args.num_requests or (256 if nano else 1000)):
        prompt = random_prompt(rng, args.input_len or rng.randint(low, high))
        output_len = args.output_len or (rng.randint(low, high) if nano else 128)
        requests.append(Request(prompt, output_len, temperature=0.6 if nano else 1.0))
    return requests


def measure(args: argparse.Namespace) -> Figures:
    requests = workload(args)
    with started(args) as engine:
        engine.run([Request(random_prompt(random.Random(-1), 32), 8)])
        traces = engine.run(requests)
    seconds = max(t.outputs[-1][0] for t in traces) - min(t.begun for t in traces)
    tokens_in = sum(len(request.prompt) for request in requests)
    tokens_out = sum(request.output_len for request in requests)
    return {
        "output tokens/s": tokens_out / seconds,
        "all tokens/s": (tokens_in + tokens_out) / seconds,
        "requests/s": len(requests) / seconds,
        "wall, s": seconds,
        **percentiles("time per token", (trace.tpot for trace in traces)),
    }


if __name__ == "__main__":  # vLLM imports the main module again in its children
    run_benchmark(__doc__, measure, add_flags)
