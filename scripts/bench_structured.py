"""What a JSON schema costs in throughput: the same requests with it and without, in turn on one engine.

    python scripts/bench_structured.py --model demo [--num-requests 1 32] [--output-len 128] [--kinds schema]

The schema asks for more than fits into `--output-len`, so that every request writes exactly that many tokens.
Every case runs once, so that everything is compiled; then the engine is left alone for `--settle-seconds`, in
which a GPU's worker records its CUDA graphs as it does between requests in service (a hundred of some 30 ms,
more where Triton's cache is empty); then every case runs again before its clock starts. What is measured
compiles and records nothing.

Other kinds of requests show what else a wish costs: see `KINDS`. A model that is only a config.json gets
random weights (`--load-format dummy`) and a made-up tokenizer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchlib.engines import model_path, random_prompt
from benchlib.harness import Figures, run_benchmark
from benchlib.made_up_tokenizer import make_tokenizer
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
SCHEMA = StructuredOutputsParams(
    json={"type": "array", "items": ITEM, "minItems": 10_000}, disable_any_whitespace=True
)
KINDS: dict[str, dict[str, Any]] = {
    "schema": {"structured_outputs": SCHEMA},
    "schema_top_p": {"structured_outputs": SCHEMA, "top_p": 0.9},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 20},
    "top_k_top_p": {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    "min_p": {"min_p": 0.1},
    "penalty": {"frequency_penalty": 0.5},
    "logprobs": {"logprobs": 5},
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-requests", type=int, nargs="+", default=[32], help="at once (32)")
    parser.add_argument("--input-len", type=int, default=64, help="tokens (64)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens (128)")
    parser.add_argument("--repeats", type=int, default=5, help="of each kind, in turn (5)")
    parser.add_argument(
        "--settle-seconds", type=float, default=0, help="for a GPU's preparations (0; a GPU wants 15)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["schema"])


def measure(args: argparse.Namespace) -> Figures:
    given: dict[str, Any] = {}
    for name in ("dtype", "load_format", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size"):
        if getattr(args, name, None) is not None:
            given[name] = getattr(args, name)
    most = max(args.num_requests)
    with tempfile.TemporaryDirectory() as folder:
        path = model_path(args.model)
        if path.is_dir() and not (path / "tokenizer.json").is_file():
            make_tokenizer(Path(folder), json.loads((path / "config.json").read_text())["vocab_size"])
            given["tokenizer"] = folder
        llm = LLM(args.model, max_num_seqs=most, enable_prefix_caching=False, **given)
        for count in args.num_requests:
            _speeds(llm, count, args, repeats=1)
        time.sleep(args.settle_seconds)
        figures: Figures = {}
        for count in args.num_requests:
            _speeds(llm, count, args, repeats=1)
            speeds = _speeds(llm, count, args, args.repeats)
            for kind, speed in speeds.items():
                figures[f"{count} requests, {kind}, output tokens/s"] = speed
                if kind != "plain":
                    figures[f"{count} requests, {kind}, % of plain"] = 100 * speed / speeds["plain"]
            print(count, {kind: round(speed) for kind, speed in speeds.items()}, file=sys.stderr, flush=True)
        llm.shutdown()
    return figures


def _speeds(llm: LLM, count: int, args: argparse.Namespace, repeats: int) -> dict[str, float]:
    """Output tokens a second of every kind, the median."""
    rng = random.Random(args.seed)
    prompts = [random_prompt(rng, args.input_len) for _ in range(count)]
    wishes: dict[str, dict[str, Any]] = {"plain": {}} | {kind: KINDS[kind] for kind in args.kinds}
    speeds: dict[str, list[float]] = {kind: [] for kind in wishes}
    for _ in range(repeats):
        for kind, wish in wishes.items():
            always = {"temperature": 1.0, "max_tokens": args.output_len, "ignore_eos": True}
            params = [SamplingParams(**(always | wish | {"seed": number})) for number in range(count)]
            begun = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - begun
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            assert tokens == count * args.output_len
            speeds[kind].append(tokens / seconds)
    return {kind: statistics.median(some) for kind, some in speeds.items()}


if __name__ == "__main__":
    run_benchmark(__doc__, measure, add_flags, engines=("headrace",))
