"""Errors of the decode step's kernels against float64, and of graphs against plain launches."""

from __future__ import annotations

import random
from typing import Any

import torch
from headrace.kernels import fused_linear
from headrace.kernels.decode_attention import decode_attention_reference
from headrace.kernels.decode_plan import plan_decode
from torch import Tensor

from benchlib.decode_chain import DecodeChain, Shape, Weights
from benchlib.graph_timing import Row
from benchlib.linear_bench import forced, implementations


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
            fused_linear.norm_linear(x, w.up, w.up_bias, **norms, activation="relu"),
            fused_linear.norm_linear_reference(*wide(x, w.up, w.up_bias), **wide_norms, activation="relu"),
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
