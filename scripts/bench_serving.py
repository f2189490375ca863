"""How long readers wait when requests come at random moments, whether or not the engine keeps up.

    python scripts/bench_serving.py --model demo --request-rate 4 [--num-requests N]

Open loop: Poisson arrivals at `--request-rate` a second; a slow engine does not slow them. Times are those
that the reader of the stream sees: TTFT (first token), TPOT (per token after it), ITL (between outputs), E2E.
"""

from __future__ import annotations

import argparse
import random

from benchlib.engines import Request, random_prompt, started
from benchlib.harness import Figures, percentiles, run_benchmark


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--request-rate", type=float, default=4.0, help="requests a second (4)")
    parser.add_argument("--num-requests", type=int, default=100)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=64)


def measure(args: argparse.Namespace) -> Figures:
    rng = random.Random(args.seed)
    arrival, requests = 0.0, []
    for _ in range(args.num_requests):
        arrival += rng.expovariate(args.request_rate)
        requests.append(Request(random_prompt(rng, args.input_len), args.output_len, arrival=arrival))
    with started(args) as engine:
        engine.run([Request(random_prompt(random.Random(-1), 32), 8)])
        traces = engine.run(requests)
    seconds = max(t.outputs[-1][0] for t in traces) - min(t.begun for t in traces)
    return {
        "requests/s": len(traces) / seconds,
        "output tokens/s": sum(trace.num_tokens for trace in traces) / seconds,
        **percentiles("TTFT", (trace.ttft for trace in traces)),
        **percentiles("TPOT", (trace.tpot for trace in traces)),
        **percentiles("ITL", (gap for trace in traces for gap in trace.gaps)),
        **percentiles("E2E", (trace.e2e for trace in traces)),
    }


if __name__ == "__main__":  # vLLM imports the main module again in its children
    run_benchmark(__doc__, measure, add_flags)
