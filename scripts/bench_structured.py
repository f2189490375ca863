"""What a JSON schema costs in throughput: the same requests with it and without, in turn on one engine.

    python scripts/bench_structured.py --model demo [--num-requests 32] [--output-len 128]

The schema asks for more than fits into `--output-len`, so that every request writes exactly that many tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from benchlib.engines import random_prompt
from benchlib.harness import Figures, run_benchmark
from headrace import LLM, SamplingParams, StructuredOutputsParams

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "price": {"type": "number"},
        "kind": {"enum": ["fruit", "vegetable", "grain"]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "origin": {"type": "object", "properties": {"country": {"type": "string"}}, "required": ["country"]},
    },
    "required": ["name", "price", "kind", "tags", "origin"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 10_000}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=int, default=32, help="at once (32)")
    parser.add_argument("--input-len", type=int, default=64, help="tokens (64)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens (128)")
    parser.add_argument("--repeats", type=int, default=5, help="of each kind, in turn (5)")


def measure(args: argparse.Namespace) -> Figures:
    given: dict[str, Any] = {}
    for name in ("dtype", "load_format", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size"):
        if getattr(args, name, None) is not None:
            given[name] = getattr(args, name)
    llm = LLM(args.model, max_num_seqs=args.num_requests, enable_prefix_caching=False, **given)
    rng = random.Random(args.seed)
    prompts = [random_prompt(rng, args.input_len) for _ in range(args.num_requests)]
    schema = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    speeds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(args.repeats + 1):
        for constrained in speeds:
            params = [
                SamplingParams(
                    temperature=1.0,
                    seed=number,
                    max_tokens=args.output_len,
                    ignore_eos=True,
                    structured_outputs=schema if constrained else None,
                )
                for number in range(args.num_requests)
            ]
            begun = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - begun
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            assert tokens == args.num_requests * args.output_len
            if repeat:  # the first is for warmth
                speeds[constrained].append(tokens / seconds)
    llm.shutdown()
    free, held = statistics.median(speeds[False]), statistics.median(speeds[True])
    return {
        "unconstrained, output tokens/s": free,
        "JSON schema, output tokens/s": held,
        "JSON schema, % of unconstrained": 100 * held / free,
    }


if __name__ == "__main__":
    run_benchmark(__doc__, measure, add_flags, engines=("headrace",))
