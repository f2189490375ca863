"""A model's row of the performance board, all measured with one engine.

    python scripts/bench_board.py --model scripts/models/llama-3.2-1b --load-format dummy
    python scripts/bench_board.py --compare headrace,vllm --rounds 1 --timeout 200 --results FILE --model ...

`b1` to `b128`: milliseconds per output token of so many requests at once, 32 tokens in and 128 out, median of
some runs. `nano`: output tokens a second of 256 requests, 100 to 1024 tokens in and out, temperature 0.6.
`prefill`: prompt tokens a second of 65536 tokens in prompts of 4096 (1024 for a short model). `poisson`:
arrivals at 40 requests a second for 4 seconds, 512 tokens in and 128 out. All prompts are fresh.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Iterator

from benchlib.engines import Engine, Request, random_prompt, started
from benchlib.harness import Figures, percentiles, run_benchmark

_CASES = ("b1", "b32", "b128", "nano", "prefill", "poisson")
_PREFILL_TOKENS = 65536


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default=",".join(_CASES), help="which of " + ", ".join(_CASES))
    parser.add_argument("--settle-seconds", type=float, default=10.0, help="wait after the first token (10)")
    parser.set_defaults(max_num_seqs=256, max_num_batched_tokens=16384, max_model_len=4352)


def measure(args: argparse.Namespace) -> Iterator[Figures]:
    rng = random.Random(args.seed)
    begun = time.perf_counter()
    with started(args, enable_prefix_caching=False) as engine:
        (first,) = engine.run([Request(random_prompt(rng, 32), 1)])
        yield {"start to first token, s": first.outputs[0][0] - begun}
        time.sleep(args.settle_seconds)
        for case in args.cases.split(","):
            yield _case(case, engine, rng, args.max_model_len)


def _case(case: str, engine: Engine, rng: random.Random, max_model_len: int) -> Figures:
    match case:
        case "nano":
            return {"nano, tokens/s": _nano(engine, rng)}
        case "poisson":
            return _poisson(engine, rng)
        case "prefill":
            return {"prefill, tokens/s": _prefill(engine, rng, max_model_len)}
    return {f"{case}, ms": _decode(engine, rng, int(case[1:]))}


def _decode(engine: Engine, rng: random.Random, batch: int) -> float:
    def seconds() -> float:
        traces = engine.run([Request(random_prompt(rng, 32), 128) for _ in range(batch)])
        return max(t.outputs[-1][0] for t in traces) - min(t.begun for t in traces)

    for _ in range(2):
        seconds()
    return 1000 * statistics.median(seconds() for _ in range(7)) / 128


def _nano(engine: Engine, rng: random.Random) -> float:
    sizes = [(rng.randint(100, 1024), rng.randint(100, 1024)) for _ in range(256)]
    traces = engine.run(
        [Request(random_prompt(rng, prompt), output, temperature=0.6) for prompt, output in sizes]
    )
    seconds = max(t.outputs[-1][0] for t in traces) - min(t.begun for t in traces)
    return sum(output for _, output in sizes) / seconds


def _poisson(engine: Engine, rng: random.Random) -> Figures:
    arrival, requests = 0.0, []
    while (arrival := arrival + rng.expovariate(40)) < 4:
        requests.append(Request(random_prompt(rng, 512), 128, arrival=arrival))
    traces = engine.run(requests)
    first = percentiles("poisson TTFT", (trace.ttft for trace in traces), (50, 99))
    return first | percentiles("poisson ITL", (gap for t in traces for gap in t.gaps), (50, 99))


def _prefill(engine: Engine, rng: random.Random, max_model_len: int) -> float:
    length = 4096 if max_model_len > 4096 else 1024

    def rate() -> float:
        prompts = [random_prompt(rng, length) for _ in range(_PREFILL_TOKENS // length)]
        traces = engine.run([Request(prompt, 1) for prompt in prompts])
        seconds = max(t.outputs[-1][0] for t in traces) - min(t.begun for t in traces)
        return _PREFILL_TOKENS / seconds

    rate()
    return statistics.median(rate() for _ in range(4))


if __name__ == "__main__":  # vLLM imports the main module again in its children
    run_benchmark(__doc__, measure, add_flags)
