"""The decode step's kernels alone: are they right, how long do they take, how near to the memory's speed.

    python scripts/bench_kernels.py                                  # all five models of the board
    python scripts/bench_kernels.py --models llama-3.2-1b --tune     # and try tilings

Three tables per model: each linear operation at one token, fused and by cuBLAS; decode attention over
contexts of different length; whole steps by batch and context. Times are of replayed CUDA graphs with every
layer's weights distinct, so that no cache flatters them. Every kernel is first compared with float64. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from benchlib.decode_chain import MODELS, DecodeChain, Shape, Weights
from benchlib.gpus import require_gpus
from benchlib.graph_timing import BYTES_PER_US, Row, compiled_in_parallel, graph_us, report
from benchlib.kernel_checks import check_attention, check_linear, check_step
from benchlib.linear_bench import bench_linear, bench_splits, bench_tilings, forced, implementations
from headrace.kernels.decode_attention import DecodeTuning
from headrace.kernels.decode_plan import DecodePlan, plan_decode
from headrace.kernels.draw_tokens import draw_tokens
from headrace.kernels.stay_thresholds import stay_thresholds
from torch import Tensor


def bench_attention(
    shape: Shape, weights: Weights, cases: list[tuple[int, int, int]], tunings: list[DecodeTuning | None]
) -> list[Row]:
    """Attention of all layers over rows whose contexts are spread evenly between two lengths."""
    rows = []
    plans = [(528, 128), (528, 256), (264, 256)] if len(tunings) > 1 else [(528, 128)]
    for batch, low, high in cases:
        contexts = [low + (high - low) * row // max(batch - 1, 1) for row in range(batch)]
        chain = DecodeChain(weights, contexts)
        qkv = torch.randn(
            batch, (shape.heads + 2 * shape.kv_heads) * shape.head_dim, device=weights.device
        ).bfloat16()

        def run(chain: DecodeChain = chain, qkv: Tensor = qkv) -> None:
            plan_decode(chain.plan, chain.contexts[:-1] + 1, chain.slots)
            for layer in range(shape.layers):
                chain.attention(qkv, layer)

        for tuning, (programs, piece) in itertools.product(tunings, plans if batch <= 8 else plans[:1]):
            chain.tuning = tuning
            heads = shape.heads, shape.kv_heads, shape.head_dim
            chain.plan = DecodePlan.empty(batch, *heads, weights.device, programs, piece)
            us = graph_us(run)
            rows.append(
                {
                    "rows": batch,
                    "contexts": f"{low}-{high}",
                    "programs": programs,
                    "piece": piece,
                    "tuning": "default" if tuning is None else str(tuple(tuning)),
                    "us/layer": us / shape.layers,
                    "TB/s": shape.kv_bytes(sum(contexts)) / us / 1e6,
                }
            )
        del chain, run
        gc.collect()
    return rows


def bench_steps(shape: Shape, weights: Weights, batches: list[int], contexts: list[int]) -> list[Row]:
    """Whole steps, and how near they are to reading weights and cache once."""
    rows = []
    for batch, context in itertools.product(batches, contexts):
        chain = DecodeChain(weights, [context] * batch)
        floor = (shape.weight_bytes + shape.kv_bytes(batch * context)) / BYTES_PER_US / 1e3
        row: Row = {"batch": batch, "context": context, "floor ms": floor, "vector": "-", "matrix": "-"}
        for way in implementations(batch):
            with forced(way):
                chain.rewind()
                row[way] = graph_us(chain.step) / 1e3
        best = min(row[way] for way in implementations(batch))
        rows.append(row | {"% floor": 100 * floor / best})
        del chain
        gc.collect()
    return rows


def bench_sampling(vocab: int, device: torch.device) -> list[Row]:
    """Drawing tokens greedily, at a temperature, and with filters, from flat and from peaked logits."""
    rows = []
    wishes = {"greedy": (0.0, 0, 1.0), "temperature": (0.6, 0, 1.0), "top_p": (1.0, 0, 0.9)}
    wishes |= {
        "top_k": (1.0, 20, 1.0),
        "top_k, top_p": (1.0, 20, 0.95),
        "top_k 5000, top_p": (1.0, 5000, 0.9),
    }
    for batch, spread, (wish, (temperature, top_k, top_p)) in itertools.product(
        (1, 8, 32, 128, 256), (1, 4), wishes.items()
    ):
        logits = (torch.randn(batch, vocab, device=device) * spread).bfloat16()
        temperatures = torch.full((batch,), temperature, device=device)
        seeds = torch.arange(batch, device=device)
        filters = (
            torch.full((batch,), top_k, dtype=torch.int32, device=device),
            torch.full((batch,), top_p, dtype=torch.float64, device=device),
            torch.full((batch,), -torch.inf, device=device),
        )

        def run(
            arguments: tuple[Tensor, Tensor, Tensor, Tensor] = (logits, temperatures, seeds, seeds),
            filters: tuple[Tensor, Tensor, Tensor] = filters,
            filtered: bool = top_k > 0 or top_p < 1,
        ) -> None:
            for _ in range(10):
                thresholds = stay_thresholds(arguments[0], arguments[1], *filters) if filtered else None
                draw_tokens(*arguments, thresholds=thresholds)

        rows.append({"rows": batch, "spread": spread, "wish": wish, "us": graph_us(run) / 10})
    return rows


def run_model(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, list[Row]]:
    """All tables of one model."""
    shape = Shape.of(name)
    weights = Weights(shape, device)
    tunings: list[DecodeTuning | None] = [None]
    if args.tune:
        tunings += [
            DecodeTuning(tile, warps, stages)
            for tile, warps, stages in itertools.product((16, 32, 64, 128), (1, 2, 4), (3, 5))
            if 32 <= tile * shape.head_dim / (32 * warps) <= 128
        ]
    cases = [(1, 64, 64), (1, 2048, 2048), (8, 1024, 1024), (128, 32, 160), (256, 100, 1100)]
    with torch.inference_mode(), compiled_in_parallel():
        for batch in (1, 2, 7, 16, 32, 128, 256):
            chain = DecodeChain(weights, [8] * batch)
            for way in implementations(batch):
                with forced(way):
                    chain.step()
            if batch in (1, 128):
                for chain.tuning in tunings:
                    chain.step()
        del chain
    tables: dict[str, list[Row]] = {}

    def add(title: str, make: Callable[[], list[Row]]) -> None:
        if args.tables is None or title.split(",")[0] in args.tables:
            tables[title] = make()
            report(f"{name}: {title}", tables[title])

    with torch.inference_mode():
        add("errors of linear operations", lambda: check_linear(shape, weights))
        add("errors of attention", lambda: check_attention(shape, weights))
        add("errors of steps", lambda: check_step(shape, weights))
        add("steps", lambda: bench_steps(shape, weights, args.batches, args.contexts))
        add("linear operations", lambda: bench_linear(shape, weights, [1, 2, 4, 8, 16]))
        add("attention", lambda: bench_attention(shape, weights, cases, tunings))
        if args.tune:
            add("tilings", lambda: bench_tilings(shape, weights))
            add("splits, 8 tokens", lambda: bench_splits(shape, weights, 8))
            add("splits, 16 tokens", lambda: bench_splits(shape, weights, 16))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ["llama-3.2-1b", "qwen3-0.6b", "qwen2.5-1.5b", "opt-125m", "llama-3.1-8b"]
    parser.add_argument(
        "--models", nargs="*", default=names, choices=sorted(p.name for p in MODELS.iterdir())
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 32, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 1024])
    parser.add_argument("--tune", action="store_true", help="try tilings, splits and tunings, too")
    parser.add_argument("--tables", nargs="+", help="only those of these titles")
    args = parser.parse_args()
    require_gpus(parser)
    device = torch.device("cuda", 0)
    results: dict[str, Any] = {}
    for name in args.models:
        results[name] = run_model(name, args, device)
        gc.collect()
        torch.cuda.empty_cache()
    results["sampling"] = bench_sampling(128256, device)
    report("drawing tokens of 128256", results["sampling"])
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "triton": triton.__version__, **results}))


if __name__ == "__main__":
    main()
