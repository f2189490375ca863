"""The layers that models are made of, split over tensor-parallel ranks.

A layer owns this rank's share of its parameters and says, as `Weight`s, which part of which checkpoint tensor
belongs where. It knows no model and no file format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ipc.errors import ConfigError
from ..kernels.embedding import embed
from ..kernels.rms_norm import rms_norm
from ..kernels.silu_mul import silu_mul
from .parallel import TensorParallel

_THREAD_WORTH = 32768
"""Torch shares elementwise work out over threads when there are more elements than this."""


@dataclass(slots=True)
class RowWise:
    """How a model's layers treat the rows that they are given: see `invariance.py`."""

    multiple: int = 1
    """Linear layers fill up their rows to a multiple of this."""
    whole_rows: bool = False
    """No thread gets part of a row: vector code and what does the rest differ in the last digit."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[rows, in] to [rows, out]."""
        missing = -len(x) % self.multiple
        if not missing:
            return F.linear(x, weight, bias)
        return F.linear(F.pad(x, (0, 0, 0, missing)), weight, bias)[: len(x)]

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[rows, 2 * size] to [rows, size]."""
        if not self.whole_rows:
            return silu_mul(gate_up)
        count = max(1, _THREAD_WORTH // gate_up.shape[1])
        return torch.cat([silu_mul(part) for part in gate_up.split(count)])


@dataclass(frozen=True)
class Place:
    """Where a model's parameters live."""

    dtype: torch.dtype
    device: torch.device
    tp: TensorParallel
    row_wise: RowWise = field(default_factory=RowWise)

    def parameter(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter, to be filled through its `Weight`."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def check_divides(self, size: int, name: str) -> None:
        """Raise ConfigError when `size`, the model's `name`, cannot be shared out evenly."""
        ranks = self.tp.size
        if size % ranks:
            message = f"tensor_parallel_size {ranks} does not divide the model's {name}, {size}"
            raise ConfigError(
                message, parameter="tensor_parallel_size", value=ranks, limit=f"a divisor of {size}"
            )


class Weight(NamedTuple):
    """One tensor of a checkpoint and where this rank's part of it goes."""

    target: Tensor
    """A view into a parameter."""
    shape: tuple[int, ...]
    """Of the whole tensor in the checkpoint."""
    part: tuple[slice, ...] = ()
    """This rank's part of it."""

    def load(self, tensor: Tensor) -> None:
        """Copy this rank's part of the whole `tensor`, converting dtype and device."""
        self.target.copy_(tensor[self.part])


Weights: TypeAlias = dict[str, Weight]
"""By checkpoint name."""


class Output(NamedTuple):
    """One of the projections fused in a `ColumnLinear`."""

    name: str
    """In the checkpoint, relative to the layer's prefix."""
    size: int
    """Of the whole output, over all ranks."""
    pieces: int
    """How many pieces it is cut into; fewer than ranks means that ranks share a piece."""


class ColumnLinear(nn.Module):
    """Linear projections of one input, fused into one matrix; each rank computes a part of every output."""

    def __init__(self, in_features: int, outputs: Sequence[Output], bias: bool, place: Place) -> None:
        super().__init__()
        rows = sum(output.size // output.pieces for output in outputs)
        self.outputs, self.tp, self.row_wise = outputs, place.tp, place.row_wise
        self.weight = place.parameter(rows, in_features)
        self.bias = place.parameter(rows) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in_features] to [tokens, this rank's rows], the outputs side by side."""
        return self.row_wise.linear(x, self.weight, self.bias)

    def weights(self, prefix: str) -> Weights:
        """`prefix` ends with a dot."""
        weights: Weights = {}
        at, in_features = 0, self.weight.shape[1]
        for name, size, pieces in self.outputs:
            rows = size // pieces
            start = self.tp.rank * pieces // self.tp.size * rows
            here, part = slice(at, at + rows), (slice(start, start + rows),)
            weights[f"{prefix}{name}.weight"] = Weight(self.weight[here], (size, in_features), part)
            if self.bias is not None:
                weights[f"{prefix}{name}.bias"] = Weight(self.bias[here], (size,), part)
            at += rows
        return weights


class RowLinear(nn.Module):
    """A linear projection of an input that is split over the ranks; the results are summed."""

    def __init__(self, in_features: int, out_features: int, bias: bool, place: Place) -> None:
        super().__init__()
        self.in_features, self.tp, self.row_wise = in_features, place.tp, place.row_wise
        self.weight = place.parameter(out_features, in_features // place.tp.size)
        self.bias = place.parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, this rank's part of in_features] to [tokens, out_features], the same on all ranks."""
        if self.tp.size == 1:
            return self.row_wise.linear(x, self.weight, self.bias)
        out = self.tp.all_reduce(F.linear(x, self.weight))
        return out if self.bias is None else out.add_(self.bias)

    def weights(self, name: str) -> Weights:
        out_features, columns = self.weight.shape
        start = self.tp.rank * columns
        part = (slice(None), slice(start, start + columns))
        weights = {f"{name}.weight": Weight(self.weight, (out_features, self.in_features), part)}
        if self.bias is not None:
            weights[f"{name}.bias"] = Weight(self.bias, (out_features,))
        return weights


class Linear(nn.Module):
    """A linear projection that every rank computes whole."""

    def __init__(self, in_features: int, out_features: int, bias: bool, place: Place) -> None:
        super().__init__()
        self.weight = place.parameter(out_features, in_features)
        self.row_wise = place.row_wise
        self.bias = place.parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.row_wise.linear(x, self.weight, self.bias)

    def weights(self, name: str) -> Weights:
        weights = {f"{name}.weight": Weight(self.weight, tuple(self.weight.shape))}
        if self.bias is not None:
            weights[f"{name}.bias"] = Weight(self.bias, tuple(self.bias.shape))
        return weights


class VocabTable(nn.Module):
    """One vector per token id, the ids split over the ranks: input embedding, output projection, or both."""

    def __init__(self, vocab_size: int, size: int, place: Place) -> None:
        super().__init__()
        self.vocab_size, self.tp, self.row_wise = vocab_size, place.tp, place.row_wise
        rows = -(-vocab_size // place.tp.size)
        self.start = min(place.tp.rank * rows, vocab_size)
        self.stop = min(self.start + rows, vocab_size)
        self.weight = place.parameter(rows, size)
        self.weight[self.stop - self.start :].zero_()

    def embed(self, ids: Tensor) -> Tensor:
        """int64 [tokens] to [tokens, size]."""
        if self.tp.size == 1 and not ids.is_cuda:
            return F.embedding(ids, self.weight)
        return self.tp.all_reduce(embed(ids, self.weight, self.start))

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, size] to float32 [rows, vocab_size], on all ranks."""
        return self.gather(self.row_wise.linear(hidden, self.weight)).float()

    def gather(self, logits: Tensor) -> Tensor:
        """[rows, of this rank's ids] to [rows, vocab_size], on all ranks."""
        return self.tp.all_gather_last(logits)[:, : self.vocab_size]

    def weights(self, name: str) -> Weights:
        target = self.weight[: self.stop - self.start]
        shape = (self.vocab_size, self.weight.shape[1])
        return {f"{name}.weight": Weight(target, shape, (slice(self.start, self.stop),))}


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight = place.parameter(size)

    def forward(self, x: Tensor, update: Tensor | None = None) -> Tensor:
        """Norm of `x`, after `x += update` in place."""
        return rms_norm(x, self.weight, self.eps, update)

    def weights(self, name: str) -> Weights:
        return {f"{name}.weight": Weight(self.weight, tuple(self.weight.shape))}


class LayerNorm(nn.Module):
    """Norm to zero mean and unit variance over the last dimension, with bias."""

    def __init__(self, size: int, eps: float, place: Place) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = place.parameter(size), place.parameter(size)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def weights(self, name: str) -> Weights:
        shape = tuple(self.weight.shape)
        return {f"{name}.weight": Weight(self.weight, shape), f"{name}.bias": Weight(self.bias, shape)}


def attention_outputs(num_heads: int, num_kv_heads: int, head_dim: int, place: Place) -> list[Output]:
    """The outputs of a fused q/k/v projection. Raises ConfigError when heads cannot be shared out.

    Each rank has its own query heads; key/value heads are split too, or held by several ranks when there are
    fewer of them than ranks.
    """
    ranks = place.tp.size
    place.check_divides(num_heads, "number of attention heads")
    if num_kv_heads % ranks and ranks % num_kv_heads:
        place.check_divides(num_kv_heads, "number of key/value heads")
    kv_pieces = min(ranks, num_kv_heads)
    return [
        Output("q_proj", num_heads * head_dim, ranks),
        Output("k_proj", num_kv_heads * head_dim, kv_pieces),
        Output("v_proj", num_kv_heads * head_dim, kv_pieces),
    ]
