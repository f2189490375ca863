"""A decode step of a dense model, made of the kernels alone: random weights, no engine, no framework modules.

Knows model configurations and kernels/. What it runs is what the worker's decode step launches: inputs from
the slot table, the layers, logits, sampling, tokens back into the slot table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from headrace.kernels.decode_attention import DecodeTuning, decode_attention
from headrace.kernels.decode_plan import DecodePlan, plan_decode
from headrace.kernels.draw_tokens import draw_tokens
from headrace.kernels.embedding import embed
from headrace.kernels.fused_linear import linear_add, norm_gate_up_silu, norm_linear
from headrace.kernels.slot_table import append_tokens, decode_inputs
from torch import Tensor

MODELS = Path(__file__).parent.parent / "models"
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that a decode step depends on."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    is_opt: bool
    qkv_bias: bool
    head_norm: bool

    @classmethod
    def of(cls, name: str) -> Shape:
        """From the folder of this name in scripts/models."""
        hf = json.loads((MODELS / name / "config.json").read_text())
        heads, kind = hf["num_attention_heads"], hf["model_type"]
        return cls(
            name=name,
            layers=hf["num_hidden_layers"],
            hidden=hf["hidden_size"],
            inner=hf["ffn_dim"] if kind == "opt" else hf["intermediate_size"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads", heads),
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            vocab=hf["vocab_size"],
            is_opt=kind == "opt",
            qkv_bias=kind in ("opt", "qwen2"),
            head_norm=kind == "qwen3",
        )

    @property
    def weight_bytes(self) -> int:
        """Of the matrices that a step reads."""
        rows = (self.heads + 2 * self.kv_heads) * self.head_dim
        layer = self.hidden * (rows + self.heads * self.head_dim + (2 if self.is_opt else 3) * self.inner)
        return 2 * (self.layers * layer + self.hidden * self.vocab)

    def kv_bytes(self, tokens: int) -> int:
        """Of keys and values of so many tokens."""
        return 4 * self.layers * self.kv_heads * self.head_dim * tokens


class LayerWeights:
    """One layer's random parameters; norms are near one, biases small, so that activations stay in range."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        size, inner, attended = shape.hidden, shape.inner, shape.heads * shape.head_dim
        qkv = attended + 2 * shape.kv_heads * shape.head_dim
        biased = shape.is_opt

        def matrix(rows: int, columns: int) -> Tensor:
            weight = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
            return weight.normal_(0, columns**-0.5)

        def vector(length: int, centre: float = 0.0) -> Tensor:
            return (centre + 0.1 * torch.randn(length, device=device)).bfloat16()

        self.qkv, self.out = matrix(qkv, size), matrix(size, attended)
        self.up, self.down = matrix(inner if shape.is_opt else 2 * inner, size), matrix(size, inner)
        self.qkv_bias = vector(qkv) if shape.qkv_bias else None
        self.out_bias, self.up_bias, self.down_bias = (
            vector(length) if biased else None for length in (size, inner, size)
        )
        self.norms = [vector(size, 1.0) for _ in range(2)]
        self.norm_biases = [vector(size) if biased else None for _ in range(2)]
        self.head_norms = [vector(shape.head_dim, 1.0) if shape.head_norm else None for _ in range(2)]


class Weights:
    """A model's."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        self.layers = [LayerWeights(shape, device) for _ in range(shape.layers)]
        self.table = torch.empty(shape.vocab, shape.hidden, dtype=torch.bfloat16, device=device).normal_()
        self.norm = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
        self.norm_bias = torch.zeros_like(self.norm) if shape.is_opt else None
        self.rotation = None
        if not shape.is_opt:
            angles = torch.arange(40_000, device=device)[:, None] * 500_000.0 ** -(
                torch.arange(shape.head_dim // 2, device=device) / (shape.head_dim // 2)
            )
            self.rotation = torch.stack([angles.cos(), -angles.sin(), angles.sin()], 1).bfloat16()


class DecodeChain:
    """Steps of `contexts` (tokens in the cache of each row) through `weights`; `step` can be captured."""

    def __init__(self, weights: Weights, contexts: list[int], temperature: float = 0.0) -> None:
        self.weights, shape, device = weights, weights.shape, weights.device
        self.shape, rows = shape, len(contexts)
        longest = max(contexts) + 512
        blocks_each = [-(-(context + 512) // BLOCK_SIZE) for context in contexts]
        order = torch.randperm(sum(blocks_each), device=device, dtype=torch.int32).split(blocks_each)
        self.block_tables = torch.zeros(rows + 1, -(-longest // BLOCK_SIZE), dtype=torch.int32, device=device)
        for row, blocks in enumerate(order):
            self.block_tables[row, : len(blocks)] = blocks
        cache = (sum(blocks_each), BLOCK_SIZE, shape.kv_heads, shape.head_dim)
        self.caches = [
            [torch.empty(cache, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)]
            for _ in range(shape.layers)
        ]
        self.slots = torch.arange(rows, dtype=torch.int32, device=device)
        self.contexts = torch.tensor([*contexts, 0], dtype=torch.int32, device=device)
        self.lengths = self.contexts.clone()
        self.tokens = torch.randint(0, shape.vocab, (rows + 1, longest), dtype=torch.int32, device=device)
        self.temperatures = torch.full((rows,), temperature, device=device)
        self.seeds = torch.arange(rows, device=device)
        self.results = torch.zeros(8, rows, dtype=torch.int32, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.plan = DecodePlan.empty(rows, shape.heads, shape.kv_heads, shape.head_dim, device)
        self.tuning: DecodeTuning | None = None
        self.logits = torch.empty(0)

    def rewind(self) -> None:
        """Back to the first step's contexts."""
        self.lengths.copy_(self.contexts)

    def step(self) -> None:
        """One token for every row."""
        inputs = decode_inputs(self.slots, self.lengths, self.tokens, self.block_tables, BLOCK_SIZE)
        plan_decode(self.plan, inputs.seq_lens, self.slots)
        x = embed(inputs.input_ids, self.weights.table)
        for number in range(self.shape.layers):
            self._layer(number, x)
        self.logits = norm_linear(
            x, self.weights.table, norm_weight=self.weights.norm, norm_bias=self.weights.norm_bias
        )
        drawn = draw_tokens(self.logits, self.temperatures, self.seeds, inputs.seq_lens, self.slots)
        append_tokens(
            drawn, self.slots, inputs.seq_lens, self.lengths, self.tokens, self.results, self.counter
        )

    def _layer(self, number: int, x: Tensor) -> None:
        w = self.weights.layers[number]
        qkv = norm_linear(x, w.qkv, w.qkv_bias, norm_weight=w.norms[0], norm_bias=w.norm_biases[0])
        attended = self.attention(qkv, number)
        linear_add(attended, w.out, w.out_bias, x)
        if self.shape.is_opt:
            up = norm_linear(
                x, w.up, w.up_bias, norm_weight=w.norms[1], norm_bias=w.norm_biases[1], activation="relu"
            )
        else:
            up = norm_gate_up_silu(x, w.norms[1], w.up, 1e-5)
        linear_add(up, w.down, w.down_bias, x)

    def attention(self, qkv: Tensor, number: int) -> Tensor:
        """Of layer `number`."""
        w = self.weights.layers[number]
        k_cache, v_cache = self.caches[number]
        return decode_attention(
            qkv,
            k_cache,
            v_cache,
            self.block_tables,
            self.plan,
            scale=self.shape.head_dim**-0.5,
            rotation=self.weights.rotation,
            q_norm=w.head_norms[0],
            k_norm=w.head_norms[1],
            reads_ahead=number > 0,
            tuning=self.tuning,
        )
