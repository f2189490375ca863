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
import contextlib
import gc
import itertools
import json
import random
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from benchlib.decode_chain import MODELS, DecodeChain, LayerWeights, Shape, Weights
from headrace.kernels import fused_linear, small_batch_linear
from headrace.kernels.decode_attention import DecodeTuning, decode_attention_reference
from headrace.kernels.decode_plan import DecodePlan, plan_decode
from headrace.kernels.draw_tokens import draw_tokens
from headrace.kernels.fused_linear import Tiling
from headrace.kernels.small_batch_linear import Split
from torch import Tensor

BYTES_PER_US = 4.3e6
"""The floor's memory speed, 4.3 TB/s: what a plain read of the weights reaches on an H200."""
IMPLEMENTATIONS = {"vector": (1 << 30, 0), "matrix": (0, 16), "cublas": (0, 0)}
"""Of the linear layers: the limits of `fused_linear` and `small_batch_linear` that force them. "matrix"
leaves to cuBLAS what `serves` leaves to it."""

Call = Callable[[], object]
Row = dict[str, Any]


# --- measuring ---------------------------------------------------------------------------------------


def graph_us(run: Call, repeats: int = 20) -> float:
    """Microseconds of one replay of `run`: the median of five timings of `repeats` replays each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(5):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(repeats):
            graph.replay()
        ended.record()
        ended.synchronize()
        times.append(float(begun.elapsed_time(ended)) * 1e3 / repeats)
    return statistics.median(times)


@contextlib.contextmanager
def compiled_in_parallel() -> Iterator[None]:
    """Inside, kernel launches only compile, on all cores at once; results are garbage."""
    function: Any = triton.runtime.jit.JITFunction
    launch = function.run

    def warm_up(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    function.run = warm_up
    try:
        with ThreadPoolExecutor(16) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        function.run = launch


@contextlib.contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Inside, linear layers are computed in this one way, whatever the number of tokens."""
    before = fused_linear.MAX_TOKENS, small_batch_linear.MAX_TOKENS
    fused_linear.MAX_TOKENS, small_batch_linear.MAX_TOKENS = IMPLEMENTATIONS[implementation]
    try:
        yield
    finally:
        fused_linear.MAX_TOKENS, small_batch_linear.MAX_TOKENS = before


def implementations(tokens: int) -> list[str]:
    """Those worth trying."""
    return [name for name, most in (("vector", 2), ("matrix", 16), ("cublas", 1 << 30)) if tokens <= most]


def report(title: str, rows: list[Row]) -> None:
    """Print rows of equal keys as a table."""
    if not rows:
        return
    text = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    table = [list(rows[0]), *text]
    widths = [max(len(line[i]) for line in table) for i in range(len(rows[0]))]
    print(f"\n{title}")
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# --- linear operations -------------------------------------------------------------------------------


def linear_calls(shape: Shape, weights: Weights, tokens: int) -> dict[str, tuple[int, Call]]:
    """By name: bytes of one layer's weights, and a call that goes over all layers."""
    x = torch.randn(tokens, shape.hidden, device=weights.device).bfloat16()
    attended = torch.randn(tokens, shape.heads * shape.head_dim, device=weights.device).bfloat16()
    inner = torch.randn(tokens, shape.inner, device=weights.device).bfloat16()
    residual = torch.zeros_like(x)

    def over_layers(one: Callable[[LayerWeights], object]) -> Call:
        return lambda: [one(layer) for layer in weights.layers]

    def qkv(w: LayerWeights) -> Tensor:
        return fused_linear.norm_linear(
            x, w.qkv, w.qkv_bias, norm_weight=w.norms[0], norm_bias=w.norm_biases[0]
        )

    def up(w: LayerWeights) -> Tensor:
        if shape.is_opt:
            return fused_linear.norm_linear(
                x, w.up, w.up_bias, norm_weight=w.norms[1], norm_bias=w.norm_biases[1], relu=True
            )
        return fused_linear.norm_gate_up_silu(x, w.norms[1], w.up, 1e-5)

    first = weights.layers[0]
    return {
        "qkv": (2 * first.qkv.numel(), over_layers(qkv)),
        "out": (
            2 * first.out.numel(),
            over_layers(lambda w: fused_linear.linear_add(attended, w.out, w.out_bias, residual)),
        ),
        "up": (2 * first.up.numel(), over_layers(up)),
        "down": (
            2 * first.down.numel(),
            over_layers(lambda w: fused_linear.linear_add(inner, w.down, w.down_bias, residual)),
        ),
        "head": (
            2 * weights.table.numel(),
            lambda: fused_linear.norm_linear(
                x, weights.table, norm_weight=weights.norm, norm_bias=weights.norm_bias
            ),
        ),
    }


def bench_linear(shape: Shape, weights: Weights, batches: list[int]) -> list[Row]:
    """Each operation in each way."""
    rows = []
    for tokens in batches:
        for name, (size, call) in linear_calls(shape, weights, tokens).items():
            row: Row = {"tokens": tokens, "op": name, "floor us": size / BYTES_PER_US}
            row |= {"vector": "-", "matrix": "-"}
            count = 1 if name == "head" else shape.layers
            for way in implementations(tokens):
                with forced(way):
                    row[way] = graph_us(call) / count
            best = min(row[way] for way in implementations(tokens))
            rows.append(row | {"TB/s": size / best / 1e6, "% floor": 100 * row["floor us"] / best})
    return rows


# --- correctness -------------------------------------------------------------------------------------


def check_linear(shape: Shape, weights: Weights) -> list[Row]:
    """Relative errors of every operation in every way against float64."""
    rows = []
    for tokens in (1, 2, 7, 16):
        for way in implementations(tokens):
            with forced(way):
                rows.append({"tokens": tokens, "way": way, **linear_errors(shape, weights, tokens)})
    return rows


def linear_errors(shape: Shape, weights: Weights, tokens: int) -> dict[str, float]:
    """By operation."""
    w = weights.layers[0]
    x, attended, inner = (
        torch.randn(tokens, size, device=weights.device).bfloat16()
        for size in (shape.hidden, shape.heads * shape.head_dim, shape.inner)
    )
    residual = torch.randn_like(x)
    norms: dict[str, Any] = {"norm_weight": w.norms[0], "norm_bias": w.norm_biases[0]}
    wide_norms = dict(zip(norms, wide(*norms.values()), strict=True))
    errors = {
        "qkv": error(
            fused_linear.norm_linear(x, w.qkv, w.qkv_bias, **norms),
            fused_linear.norm_linear_reference(*wide(x, w.qkv, w.qkv_bias), **wide_norms),
        )
    }
    for name, (inputs, weight, bias) in {
        "out": (attended, w.out, w.out_bias),
        "down": (inner, w.down, w.down_bias),
    }.items():
        errors[name] = error(
            fused_linear.linear_add(inputs, weight, bias, residual.clone()),
            fused_linear.linear_add_reference(*wide(inputs, weight, bias, residual)),
        )
    if shape.is_opt:
        errors["up"] = error(
            fused_linear.norm_linear(x, w.up, w.up_bias, **norms, relu=True),
            fused_linear.norm_linear_reference(*wide(x, w.up, w.up_bias), **wide_norms, relu=True),
        )
    else:
        errors["up"] = error(
            fused_linear.norm_gate_up_silu(x, w.norms[1], w.up, 1e-5),
            fused_linear.norm_gate_up_silu_reference(*wide(x, w.norms[1], w.up, 1e-5)),
        )
    return errors


def check_attention(shape: Shape, weights: Weights) -> list[Row]:
    """Relative errors of decode attention, output and cache, against float64."""
    rows = []
    for contexts in (
        [0],
        [700],
        [3000],
        [5, 16, 17, 64, 300, 1023],
        [random.randint(0, 900) for _ in range(140)],
    ):
        chain = DecodeChain(weights, contexts)
        seq_lens = chain.contexts[:-1] + 1
        qkv = torch.randn(
            len(contexts), (shape.heads + 2 * shape.kv_heads) * shape.head_dim, device=weights.device
        ).bfloat16()
        w = weights.layers[1]
        k_cache, v_cache = wide(*chain.caches[1])
        expected = decode_attention_reference(
            qkv.double(),
            k_cache,
            v_cache,
            chain.block_tables,
            seq_lens,
            scale=shape.head_dim**-0.5,
            rotation=None if weights.rotation is None else weights.rotation.double(),
            q_norm=None if w.head_norms[0] is None else w.head_norms[0].double(),
            k_norm=None if w.head_norms[1] is None else w.head_norms[1].double(),
        )
        plan_decode(chain.plan, seq_lens, chain.slots)
        outs = [chain.attention(qkv, 1) for _ in range(3)]
        rows.append(
            {
                "rows": len(contexts),
                "longest": max(contexts),
                "out": max(error(out, expected) for out in outs),
                "keys": error(chain.caches[1][0], k_cache),
                "values": error(chain.caches[1][1], v_cache),
            }
        )
    return rows


def check_step(shape: Shape, weights: Weights) -> list[Row]:
    """Logits of a whole step, by each kernel and by cuBLAS; a graph replayed often against plain launches."""
    rows = []
    for batch, way in ((1, "vector"), (1, "matrix"), (2, "vector"), (8, "matrix"), (16, "matrix")):
        chain = DecodeChain(weights, [100 + 7 * row for row in range(batch)])
        tokens = chain.tokens.clone()
        results = {}
        for implementation in (way, "cublas"):
            with forced(implementation):
                chain.rewind()
                chain.tokens.copy_(tokens)
                chain.step()
                results[implementation] = chain.logits.clone()
        with forced(way):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain.step()
        differing = 0.0
        for _ in range(50):
            chain.rewind()
            chain.tokens.copy_(tokens)
            graph.replay()
            differing = max(differing, error(chain.logits, results[way]))
        distance = error(results[way], results["cublas"])
        rows.append({"batch": batch, "way": way, "to cublas": distance, "worst of 50 replays": differing})
    return rows


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def wide(*values: Any) -> list[Any]:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


# --- attention and steps -----------------------------------------------------------------------------


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
    """Drawing tokens, greedily and at a temperature."""
    rows = []
    for batch, temperature in itertools.product((1, 8, 128, 256), (0.0, 0.6)):
        logits = torch.randn(batch, vocab, device=device).bfloat16()
        temperatures = torch.full((batch,), temperature, device=device)
        seeds = torch.arange(batch, device=device)

        def run(arguments: tuple[Tensor, ...] = (logits, temperatures, seeds, seeds)) -> None:
            for _ in range(10):
                draw_tokens(*arguments)

        rows.append({"rows": batch, "temperature": temperature, "us": graph_us(run) / 10})
    return rows


def bench_tilings(shape: Shape, weights: Weights) -> list[Row]:
    """Each operation at one token under every neighbouring tiling; the best five of each."""
    rows = []
    chosen: dict[tuple[int, int, bool], Tiling] = {}
    original = fused_linear.tiling
    fused_linear.tiling = lambda *key: chosen.get(key) or original(*key)  # type: ignore[assignment]
    keys = {
        "qkv": ((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.hidden, False),
        "out": (shape.hidden, shape.heads * shape.head_dim, False),
        "up": (shape.inner, shape.hidden, not shape.is_opt),
        "down": (shape.hidden, shape.inner, False),
        "head": (shape.vocab, shape.hidden, False),
    }
    try:
        with forced("vector"):
            calls = linear_calls(shape, weights, 1)
            with compiled_in_parallel():
                for name, key in keys.items():
                    for candidate in candidates(original(*key), key):
                        chosen[key] = candidate
                        calls[name][1]()
            for name, key in keys.items():
                timed = []
                for candidate in candidates(original(*key), key):
                    chosen[key] = candidate
                    count = 1 if name == "head" else shape.layers
                    timed.append((graph_us(calls[name][1], 10) / count, candidate))
                default = timed[0][0]
                for us, candidate in sorted(timed, key=lambda pair: pair[0])[:4]:
                    floor = calls[name][0] / BYTES_PER_US
                    rows.append(
                        {
                            "op": name,
                            "tiling": str(tuple(candidate)),
                            "us": us,
                            "default us": default,
                            "floor": floor,
                        }
                    )
                chosen.clear()
    finally:
        fused_linear.tiling = original
    return rows


def candidates(default: Tiling, key: tuple[int, int, bool]) -> list[Tiling]:
    """The default, and tilings with 16 to 160 weights a thread."""
    out_features, in_features, gated = key
    found = [default]
    for rows, warps, walk in itertools.product((1, 2, 4, 8, 16), (2, 4, 8, 16), (None, 2, 3)):
        weights = rows * (2 if gated else 1) * in_features / (32 * warps)
        programs = out_features / rows
        if walk and (warps * walk > 16 or programs < 3 * 132 * walk or weights > 64):
            continue
        if 16 <= weights <= 128 and programs >= 132:
            found.append(Tiling(rows, default.block_k, warps, walk and 132 * walk))
    return found


def bench_splits(shape: Shape, weights: Weights, tokens: int) -> list[Row]:
    """Each operation by matrix instructions, with its columns shared out in many ways; the best of each."""
    sizes = {
        "qkv": shape.hidden,
        "out": shape.heads * shape.head_dim,
        "up": shape.hidden,
        "down": shape.inner,
        "head": shape.hidden,
    }
    rows, original = [], small_batch_linear.split
    chosen: Split | None = None
    small_batch_linear.split = lambda size, gated=False: chosen or original(size, gated)  # type: ignore[assignment]
    try:
        with forced("matrix"):
            calls = linear_calls(shape, weights, tokens)
            with compiled_in_parallel():
                for name, size in sizes.items():
                    for chosen in splits(size):  # noqa: B007 - the lambda above reads it
                        calls[name][1]()
            for name, size in sizes.items():
                count = 1 if name == "head" else shape.layers
                chosen = None
                default = graph_us(calls[name][1], 10) / count
                timed = []
                for chosen in splits(size):
                    us = graph_us(calls[name][1], 10) / count
                    timed.append((us, tuple(chosen)))
                floor = calls[name][0] / BYTES_PER_US
                for us, best in sorted(timed)[:3]:
                    rows.append(
                        {
                            "op": name,
                            "tokens": tokens,
                            "split": best,
                            "us": us,
                            "default": default,
                            "floor": floor,
                        }
                    )
    finally:
        small_batch_linear.split = original
    return rows


def splits(in_features: int) -> list[Split]:
    """With 64 or 128 weights of a thread under way."""
    return [
        Split(warps, columns, ahead * 32 // (rows * columns), rows)
        for warps, columns, ahead, rows in itertools.product(
            (2, 4, 8), (32, 64, 128), (64, 128), (16, 32, 64)
        )
        if in_features % (warps * columns) == 0
        and ahead * 32 % (rows * columns) == 0
        and ahead * 32 * warps <= rows * in_features
    ]


# --- all of it ---------------------------------------------------------------------------------------


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
        "--models", nargs="+", default=names, choices=sorted(p.name for p in MODELS.iterdir())
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 32, 128])
    parser.add_argument("--contexts", nargs="+", type=int, default=[64, 1024])
    parser.add_argument("--tune", action="store_true", help="try tilings, splits and tunings, too")
    parser.add_argument("--tables", nargs="+", help="only those of these titles")
    args = parser.parse_args()
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
