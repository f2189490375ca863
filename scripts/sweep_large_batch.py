"""Products of prompts: tilings of `large_batch_linear` beside cuBLAS and the kernels that it needs around it.

    python scripts/sweep_large_batch.py --seconds 60 --out DIR

For each matrix of the models of scripts/models and each number of tokens: microseconds of one product in a
CUDA graph, and TFLOP/s; then a layer's four products in a row. "alone" is cuBLAS's product without norm, gate
or anything else. Each result is compared with cuBLAS's, and 128 of its rows with float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchlib.decode_chain import Shape
from benchlib.graph_timing import compiled_in_parallel
from headrace.kernels.large_batch_linear import Tiling, large_batch_linear, parts_of
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.silu_mul import silu_mul
from sweep_medium_batch import Op, error, ops_of
from torch import Tensor

EPS = 1e-5
LIMIT = 0.006
ROUND_MS = 10.0

WAYS = {
    "both": Tiling(128, 256, 4),
    "both 16": Tiling(128, 256, 4, beside=16),
    "both 4": Tiling(128, 256, 4, beside=4),
    "small": Tiling(128, 128, 6),
    "turns": Tiling(128, 128, 5, turns=True, beside=16),
    "turns 8": Tiling(128, 128, 5, turns=True),
    "turns wide": Tiling(64, 256, 4, turns=True, beside=16),
}


class Watchdog:
    """Ends the process when a way does not come to an end, and names it in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = set(path.read_text().splitlines()) if path.exists() else set()
        self.now: tuple[str, float] | None = None
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while True:
            time.sleep(0.5)
            now = self.now
            if now is not None and time.monotonic() - now[1] > 6:
                with self.path.open("a") as file:
                    file.write(now[0] + "\n")
                print("HANGS", now[0], flush=True)
                os._exit(7)


class Case:
    """One linear operation on so many tokens."""

    def __init__(self, bench: Bench, op: Op, tokens: int, parts: int, has_bias: bool) -> None:
        self.op, self.parts = op, parts
        copies = max(1, min(16, bench.pool.numel() // op.size, -(-120_000_000 // (2 * op.size))))
        self.weights = [
            bench.pool[i * op.size : (i + 1) * op.size].view(op.rows, op.inputs) for i in range(copies)
        ]
        self.x = bench.random(tokens, op.inputs)
        self.residual = bench.random(tokens, op.outputs) if op.adds else self.x
        self.norm = torch.ones(op.inputs, device=bench.device, dtype=torch.bfloat16)
        self.bias = bench.random(op.outputs)[0:] if has_bias and op.name == "qkv" else None
        self.squares = None
        if not op.adds:
            self.squares = self.x.float().square().view(tokens, parts, -1).sum(-1).t().contiguous()
        self.left = torch.empty(-(-op.outputs // 128), tokens, device=bench.device)
        self.flop = 2.0 * tokens * op.size

    def today(self, weight: Tensor, residual: Tensor) -> Tensor:
        if self.op.adds:
            return residual.addmm_(self.x, weight.t())
        normed = rms_norm(self.x, self.norm, EPS)
        y = F.linear(normed, weight, self.bias)
        return silu_mul(y) if self.op.gated else y

    def alone(self, weight: Tensor, residual: Tensor) -> Tensor:
        return F.linear(self.x, weight)

    def ours(self, tiling: Tiling, weight: Tensor, residual: Tensor) -> Tensor:
        left = self.left[: parts_of(tiling, self.op.outputs)] if self.op.adds else None
        return large_batch_linear(
            self.x,
            weight,
            tiling=tiling,
            bias=self.bias,
            squares=self.squares,
            eps=EPS,
            gated=self.op.gated,
            residual=residual if self.op.adds else None,
            leave_squares=left,
        )

    def wrong(self, tiling: Tiling, expected: Tensor, exact: Tensor, rows: Tensor) -> str:
        """What is wrong with a tiling's result, if anything."""
        poison = torch.full_like(expected, float("nan"))
        del poison  # the next allocation of this size finds it
        self.left.fill_(float("nan"))
        out = self.ours(tiling, self.weights[0], self.residual.clone())
        off = float((out.float() - expected.float()).norm() / expected.float().norm())
        precise = error(out[rows], exact)
        found = "" if off < LIMIT and precise < LIMIT else f"off {off:.2g} {precise:.2g}"
        if self.op.adds:
            left = self.left[: parts_of(tiling, self.op.outputs)].sum(0)
            own = out.float().square().sum(-1)
            if not float(((left - own) / own).abs().max()) < 1e-4:
                found += " squares"
        return found

    def exact(self, rows: Tensor) -> Tensor:
        x, weight = self.x[rows].double(), self.weights[0].double()
        y = x @ weight.t()
        if self.op.adds:
            return y + self.residual[rows].double()
        y = y * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        if self.bias is not None:
            y = y + self.bias.double()
        if self.op.gated:
            gate, up = y.chunk(2, dim=-1)
            return F.silu(gate) * up
        return y


class Bench:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda")
        self.pool = torch.empty(400_000_000, dtype=torch.bfloat16, device=self.device).normal_(0, 0.02)
        self.noise = torch.empty(16384 * 14336, dtype=torch.bfloat16, device=self.device).normal_()

    def random(self, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        return self.noise[:size].clone().view(shape)


class Timed:
    """A graph, replayed for about `ROUND_MS` at a time."""

    def __init__(self, run: Callable[[], object], each: int) -> None:
        self.each = each
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            run()
        self.repeats = 1
        self.repeats = max(1, round(ROUND_MS * 1e3 / (self.us() * each)))

    def us(self) -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(self.repeats):
            self.graph.replay()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended)) * 1e3 / self.repeats / self.each


def medians(timed: dict[str, Timed], rounds: int = 3) -> dict[str, float]:
    """Ways take turns, so that all see the same temperature and clock."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, one in timed.items():
            times[name].append(one.us())
    return {name: statistics.median(values) for name, values in times.items()}


def sweep_case(case: Case, tokens: int, ways: dict[str, Tiling], dog: Watchdog) -> dict[str, Any]:
    rows = torch.randint(0, tokens, (128,), device="cuda")
    rows[:2] = torch.tensor([0, tokens - 1])
    expected, exact = case.today(case.weights[0], case.residual.clone()), case.exact(rows)
    timed: dict[str, Timed] = {}
    wrong: dict[str, str] = {}
    sink = torch.zeros_like(case.residual)

    def over(product: Callable[[Tensor, Tensor], Tensor]) -> Timed:
        return Timed(lambda: [product(weight, sink) for weight in case.weights], len(case.weights))

    timed["today"], timed["alone"] = over(case.today), over(case.alone)
    for name, tiling in ways.items():
        key = f"{name}{' gated' * case.op.gated}{' adds' * case.op.adds}"
        if key in dog.skipped:
            continue
        dog.now = key, time.monotonic()
        try:
            found = case.wrong(tiling, expected, exact, rows)
            if found:
                wrong[name] = found
            timed[name] = over(lambda w, r, t=tiling: case.ours(t, w, r))  # type: ignore[misc]
        except Exception as failure:
            wrong[name] = repr(failure)[:200]
            if "CUDA" in repr(failure):
                raise
        torch.cuda.synchronize()
        dog.now = None
    us = medians(timed)
    return {"us": us, "tflops": {n: case.flop / t / 1e6 for n, t in us.items()}, "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--models", nargs="+", default=["llama-3.1-8b", "llama-3.2-1b", "qwen2.5-1.5b", "qwen3-0.6b"]
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384, 4096, 1024])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("."))
    args = parser.parse_args()
    ways = {name: WAYS[name] for name in args.ways}
    begun = time.monotonic()
    bench = Bench()
    dog = Watchdog(args.out / "skipped.txt")
    results: dict[str, Any] = {}

    def say(line: str) -> None:
        print(line, flush=True)

    shapes = [Shape.of(name) for name in args.models]
    with compiled_in_parallel():
        for shape in shapes:
            for op in ops_of(shape)[:4]:
                parts = -(-shape.hidden // 256)
                case = Case(bench, op, 512, parts, "qwen2.5" in shape.name)
                for tiling in ways.values():
                    case.ours(tiling, case.weights[0], case.residual)
    say(f"compiled after {time.monotonic() - begun:.1f} s")
    for tokens in args.tokens:
        for shape in shapes:
            layer: dict[str, float] = {"today": 0.0, "alone": 0.0, "best": 0.0}
            for op in ops_of(shape)[:4]:
                if time.monotonic() - begun > args.seconds:
                    say(f"{shape.name} {op.name} {tokens}: no time left")
                    continue
                case = Case(bench, op, tokens, -(-shape.hidden // 256), "qwen2.5" in shape.name)
                found = sweep_case(case, tokens, ways, dog)
                results[f"{shape.name} {op.name} {tokens}"] = found
                us, tflops = found["us"], found["tflops"]
                ranked = sorted((t, n) for n, t in us.items() if n not in ("today", "alone"))
                table = "  ".join(f"{n} {t:.0f} ({tflops[n]:.0f})" for t, n in ranked)
                say(
                    f"{shape.name} {tokens} {op.name}: today {us['today']:.0f} ({tflops['today']:.0f}) "
                    f"alone {us['alone']:.0f} ({tflops['alone']:.0f}) | {table}"
                    + (f" WRONG {found['wrong']}" if found["wrong"] else "")
                )
                layer["today"] += us["today"]
                layer["alone"] += us["alone"]
                layer["best"] += ranked[0][0]
            say(f"{shape.name} {tokens} layer: " + "  ".join(f"{n} {t:.0f}" for n, t in layer.items()))
            (args.out / "sweep.json").write_text(json.dumps(results))
    say(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
