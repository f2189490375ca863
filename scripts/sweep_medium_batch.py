"""Products of 17 to 128 tokens: every tiling of `medium_batch_linear` that is worth a try, beside cuBLAS.

    python scripts/sweep_medium_batch.py --seconds 120 --out DIR

For each matrix of the models of scripts/models and each number of tokens: microseconds of one product in a
CUDA graph of many, whose weights together exceed the second-level cache; then a layer's four products in a
row, by cuBLAS and by the best tilings (of products left out: `tiling`'s choice). Each result is compared with
float64.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchlib.decode_chain import Shape
from benchlib.gpus import require_gpus
from benchlib.graph_timing import BYTES_PER_US, compiled_in_parallel, graph_us
from headrace.kernels.medium_batch_linear import Tiling, medium_batch_linear, parts_of, tiling
from headrace.kernels.silu_mul import silu_mul
from torch import Tensor

SHARED = 227 * 1024
SMS = 132
MODELS = ["qwen2.5-1.5b", "llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b"]
EPS = 1e-5
LIMIT = 0.006
"""Of the relative error; bfloat16's own rounding gives 0.002 to 0.004."""


class Op(NamedTuple):
    """A linear operation of a layer."""

    name: str
    outputs: int
    inputs: int
    gated: bool = False
    adds: bool = False

    @property
    def rows(self) -> int:
        return self.outputs * (2 if self.gated else 1)

    @property
    def size(self) -> int:
        return self.rows * self.inputs


def ops_of(shape: Shape) -> list[Op]:
    heads = shape.heads * shape.head_dim
    return [
        Op("qkv", heads + 2 * shape.kv_heads * shape.head_dim, shape.hidden),
        Op("out", shape.hidden, heads, adds=True),
        Op("up", shape.inner, shape.hidden, gated=not shape.is_opt),
        Op("down", shape.hidden, shape.inner, adds=True),
        Op("head", shape.vocab, shape.hidden),
    ]


def candidates(op: Op, tokens: int) -> list[Tiling]:
    """Tilings that give most processors something to do and fit into shared memory."""
    found = []
    widest = 1 << (tokens - 1).bit_length()
    for rows in (64, 128):
        outputs = rows // 2 if op.gated else rows
        for block_tokens in sorted({widest, widest // 2, max(widest // 4, 32)}, reverse=True):
            if not 32 <= block_tokens <= 128 or outputs < 64:
                continue
            tiles = -(-op.outputs // outputs) * (-(-tokens // block_tokens))
            for shares in (1, 2, 4, 8):
                programs = tiles * shares
                if shares > 1 and (programs > 2 * SMS or block_tokens < 4 * shares):
                    continue
                if programs < (40 if op.gated else 88) or (block_tokens == widest // 4 and shares > 2):
                    continue
                found += staged(op, Tiling(rows, block_tokens, 64, 0, shares), programs)
    return found


def staged(op: Op, tiling: Tiling, programs: int) -> list[Tiling]:
    """With rings that leave room for one program a processor, or for two."""
    found = []
    for block_k in (64, 128):
        stage = (tiling.rows + tiling.tokens) * block_k * 2
        steps = -(-op.inputs // block_k) // tiling.shares
        for room in (SHARED // 2 - 2048, SHARED - 4096):
            stages = min(room // stage, 8, max(steps, 2))
            alone = stages * stage > SHARED // 2 - 2048
            if stages < 2 or (alone and programs > SMS):
                continue
            if block_k == 128 and stages * 2 < 6 and op.inputs > 4 * block_k * tiling.shares:
                continue
            found.append(tiling._replace(block_k=block_k, stages=stages))
    return list(dict.fromkeys(found))


class Bench:
    """Products whose weights are slices of one big random tensor."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.pool = torch.empty(640_000_000, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
        self.device = device

    def weights(self, op: Op) -> list[Tensor]:
        copies = max(2, min(48, -(-200_000_000 // (2 * op.size))))
        copies = max(1, min(copies, self.pool.numel() // op.size))
        return [self.pool[i * op.size : (i + 1) * op.size].view(op.rows, op.inputs) for i in range(copies)]

    def inputs(self, op: Op, tokens: int) -> tuple[Tensor, Tensor]:
        """x, and what `out` and `down` add to."""
        x = torch.randn(tokens, op.inputs, device=self.device).bfloat16()
        return x, torch.randn(tokens, op.outputs, device=self.device).bfloat16()


def by_cublas(op: Op, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    if op.adds:
        return residual.addmm_(x, weight.t())
    return silu_mul(F.linear(x, weight), x, EPS) if op.gated else F.linear(x, weight)


def by_tiling(op: Op, x: Tensor, weight: Tensor, residual: Tensor, tiling: Tiling, squares: Tensor) -> Tensor:
    """`squares`: of x, read by `up`; of the result, left by `out`."""
    if op.gated:
        return medium_batch_linear(x, weight, tiling=tiling, squares=squares, eps=EPS, gated=True)
    if op.name == "out":
        return medium_batch_linear(
            x, weight, tiling=tiling, residual=residual, leave_squares=squares_for(op, tiling, x)
        )
    return medium_batch_linear(x, weight, tiling=tiling, residual=residual if op.adds else None)


def squares_for(op: Op, tiling: Tiling, x: Tensor) -> Tensor:
    return torch.empty(parts_of(tiling, op.outputs), len(x), device=x.device)


def squares_of(x: Tensor) -> Tensor:
    """In as many parts as a product of 64 rows a tile leaves them."""
    return x.float().square().view(len(x), -1, 64).sum(-1).t().contiguous()


def exact(op: Op, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    y = x @ weight.t()
    if op.gated:
        y = y * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y + residual.double() if op.adds else y


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def sweep_op(bench: Bench, op: Op, tokens: int, tilings: list[Tiling]) -> dict[str, Any]:
    """Times of all tilings, best first; those that are wrong or do not run are named."""
    weights, (x, residual) = bench.weights(op), bench.inputs(op, tokens)
    expected = exact(op, x, weights[0], residual)
    repeats = 4 if op.size > 50_000_000 else 8
    sink = torch.zeros_like(residual)
    squares = squares_of(x)

    def us(call: Callable[[Tensor], object]) -> float:
        sink.zero_()
        return graph_us(lambda: [call(w) for w in weights], repeats) / len(weights)

    def worst(tiling: Tiling) -> float:
        errors = []
        for _ in range(2):
            poison = torch.full_like(residual, float("nan"))
            del poison  # the next allocation of this size finds it
            errors.append(error(by_tiling(op, x, weights[0], residual.clone(), tiling, squares), expected))
        return max(errors, key=lambda e: (e != e, e))

    cublas = us(lambda w: by_cublas(op, x, w, sink))
    timed: list[tuple[float, list[int], float]] = []
    wrong: list[tuple[list[int], str]] = []
    for way in tilings:
        try:
            off = worst(way)
            if not off < LIMIT:
                wrong.append((list(way), f"{off:.2g}"))
                continue
            took = us(functools.partial(_into, op, x, sink, way, squares))
        except Exception as failure:
            if "CUDA" in str(failure):
                raise
            wrong.append((list(way), repr(failure)[:300]))
            continue
        timed.append((took, list(way), round(off, 5)))
    timed.sort()
    return {"cublas": cublas, "timed": timed, "wrong": wrong}


def _into(op: Op, x: Tensor, sink: Tensor, tiling: Tiling, squares: Tensor, weight: Tensor) -> Tensor:
    return by_tiling(op, x, weight, sink, tiling, squares)


def bench_layer(bench: Bench, shape: Shape, tokens: int, best: dict[str, Tiling]) -> dict[str, float]:
    """Microseconds of a layer's four products in a row, each waiting for the one before."""
    ops = {op.name: op for op in ops_of(shape)}
    names = ["qkv", "out", "up", "down"]
    size = sum(ops[name].size for name in names)
    copies = max(1, min(16, bench.pool.numel() // size))
    layers, place = [], 0
    for _ in range(copies):
        layer = {}
        for name in names:
            op = ops[name]
            layer[name] = bench.pool[place : place + op.size].view(op.rows, op.inputs)
            place += op.size
        layers.append(layer)
    stream = torch.randn(tokens, shape.hidden, device=bench.device).bfloat16()
    attended = torch.randn(tokens, shape.heads * shape.head_dim, device=bench.device).bfloat16()

    def chain(product: Callable[..., Tensor]) -> None:
        for layer in layers:
            product(ops["qkv"], stream, layer["qkv"], stream)
            product(ops["out"], attended, layer["out"], stream)
            hidden = product(ops["up"], stream, layer["up"], stream)
            product(ops["down"], hidden, layer["down"], stream)

    left: list[Tensor] = []

    def mixed(op: Op, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        if op.name == "out":
            left[:] = [squares_for(op, best["out"], x)]
            return medium_batch_linear(
                x, weight, tiling=best["out"], residual=residual, leave_squares=left[0]
            )
        return by_tiling(op, x, weight, residual, best[op.name], left[0] if op.gated else x)

    found = {"cublas": graph_us(lambda: chain(by_cublas), 4) / copies}
    stream.normal_()
    found["tiled"] = graph_us(lambda: chain(mixed), 4) / copies
    # Results of graphs replayed often are equal to those of plain launches.
    start = stream.normal_().clone()
    chain(mixed)
    expected = stream.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(mixed)
    different = 0
    for _ in range(30):
        stream.copy_(start)
        graph.replay()
        different += int(not torch.equal(stream, expected))
    return found | {"floor": 2 * size / BYTES_PER_US, "replays that differ": different}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", default=["qwen2.5-1.5b", "llama-3.2-1b", "llama-3.1-8b", "qwen3-0.6b"]
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[128, 64, 32])
    parser.add_argument("--ops", nargs="+", default=["qkv", "out", "up", "down", "head"])
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    require_gpus(parser)
    begun = time.monotonic()
    bench = Bench(torch.device("cuda"))
    results: dict[str, Any] = {}

    def say(line: str) -> None:
        print(line, flush=True)

    for tokens in args.tokens:
        for name in args.models:
            if time.monotonic() - begun > args.seconds:
                say(f"{name} {tokens}: no time left")
                continue
            shape = Shape.of(name)
            try:
                sweep_model(bench, shape, tokens, args.ops, results, say)
            except Exception as failure:
                say(f"{name} {tokens} failed: {failure!r}")
                if "CUDA error" in str(failure):
                    raise
            (args.out / "sweep.json").write_text(json.dumps(results))
    say(f"{time.monotonic() - begun:.0f} s")


def sweep_model(
    bench: Bench,
    shape: Shape,
    tokens: int,
    names: list[str],
    results: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    tilings = {op.name: candidates(op, tokens) if op.name in names else [] for op in ops_of(shape)}
    begun = time.monotonic()
    with compiled_in_parallel():
        for op in ops_of(shape):
            weight, (x, residual) = bench.weights(op)[0], bench.inputs(op, tokens)
            for way in tilings[op.name]:
                by_tiling(op, x, weight, residual, way, squares_of(x))
    compiled = time.monotonic() - begun
    chosen = {op.name: tiling(tokens, op.outputs, op.inputs, op.gated) for op in ops_of(shape)}
    best = {name: way for name, way in chosen.items() if way is not None}
    for op in ops_of(shape):
        if op.name not in names:
            continue
        found = sweep_op(bench, op, tokens, tilings[op.name])
        results[f"{shape.name} {op.name} {tokens}"] = found
        floor = 2 * op.size / BYTES_PER_US
        top = "  ".join(f"{us:.2f} {tuple(t)}" for us, t, _ in found["timed"][:3])
        bad = f" WRONG {found['wrong'][:2]}" if found["wrong"] else ""
        case = f"{shape.name} {tokens:3d} {op.name:4s}"
        rule = [round(us, 2) for us, t, _ in found["timed"] if t == list(chosen[op.name] or ())]
        say(f"{case} rule {tuple(chosen[op.name] or ())} {rule}")
        say(f"{case} floor {floor:6.2f} cublas {found['cublas']:6.2f} | {top}{bad}")
        if found["timed"]:
            best[op.name] = Tiling(*found["timed"][0][1])
    if {"qkv", "out", "up", "down"} <= set(best):
        layer = bench_layer(bench, shape, tokens, best)
        results[f"{shape.name} layer {tokens}"] = layer
        say(f"{shape.name} {tokens:3d} layer {json.dumps({k: round(v, 2) for k, v in layer.items()})}")
    say(f"   ({sum(map(len, tilings.values()))} tilings, {compiled:.1f} s to compile)")


if __name__ == "__main__":
    main()
