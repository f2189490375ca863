"""The linear operations of a decode layer: each in every way that there is, and under other tilings."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from headrace.kernels import fused_linear, small_batch_linear, vector_linear
from headrace.kernels.small_batch_linear import Split
from headrace.kernels.vector_linear import Tiling
from torch import Tensor

from benchlib.decode_chain import LayerWeights, Shape, Weights
from benchlib.graph_timing import BYTES_PER_US, Call, Row, compiled_in_parallel, graph_us

_WAYS = {"vector": (1 << 30, 0), "matrix": (0, 16), "cublas": (0, 0)}
"""The limits of `fused_linear` and `small_batch_linear` that force a way. "matrix" leaves to cuBLAS what
`serves` leaves to it."""


@contextlib.contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Inside, linear layers are computed in this one way, whatever the number of tokens."""
    before = fused_linear.MAX_TOKENS, small_batch_linear.MAX_TOKENS
    fused_linear.MAX_TOKENS, small_batch_linear.MAX_TOKENS = _WAYS[implementation]
    try:
        yield
    finally:
        fused_linear.MAX_TOKENS, small_batch_linear.MAX_TOKENS = before


def implementations(tokens: int) -> list[str]:
    """Those worth trying."""
    return [name for name, most in (("vector", 2), ("matrix", 16), ("cublas", 1 << 30)) if tokens <= most]


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
                x, w.up, w.up_bias, norm_weight=w.norms[1], norm_bias=w.norm_biases[1], activation="relu"
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


def bench_tilings(shape: Shape, weights: Weights) -> list[Row]:
    """Each operation at one token under every neighbouring tiling; the best five of each."""
    rows = []
    chosen: dict[tuple[int, int, bool], Tiling] = {}
    original = vector_linear.tiling
    vector_linear.tiling = lambda *key: chosen.get(key) or original(*key)  # type: ignore[assignment]
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
        vector_linear.tiling = original
    return rows


def candidates(default: Tiling, key: tuple[int, int, bool]) -> list[Tiling]:
    """The default, and tilings with 32 to 160 weights a thread, eight of them in one load."""
    out_features, in_features, gated = key
    found = [default]
    for rows, groups, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if warps % groups:
            continue
        block_k = 256 * warps // groups
        columns = -(-in_features // block_k) * block_k
        weights = rows * groups * (2 if gated else 1) * columns / (32 * warps)
        programs = out_features / (rows * groups)
        if 32 <= weights <= 160 and programs >= 96 and columns <= 1.2 * in_features:
            found.append(Tiling(rows, groups, block_k, warps))
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
