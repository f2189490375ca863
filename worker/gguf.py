"""Weights from a GGUF file: tensors found by their Hugging Face names, dequantized as they are copied.

The header is read by `ipc.gguf`, the formats of the blocks are the `gguf` package's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from ..ipc.errors import ConfigError
from ..ipc.gguf import TensorInfo, read_gguf_header
from .layers import Weight

ROPE_DIVISORS = "rope_freqs.weight"
"""How Llama 3's files carry its rope scaling. Not a parameter: the model's config has it already."""

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CHUNK = 1 << 18
"""Elements dequantized at a time: their float32 form stays in a core's cache."""


class GgufFile:
    """The tensors of a file, whole or in parts. Raises ConfigError when the file is not as it must be."""

    def __init__(self, path: Path) -> None:
        header = read_gguf_header(path)
        self._path = path
        self._bytes: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        self._tensors = {_hf_name(name): info for name, info in header.tensors.items()}
        self._heads = _permuted_heads(header.metadata)
        for name, info in self._tensors.items():
            self._check(name, info)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by its Hugging Face name; the name in the file where it has no other."""
        return {name: info.shape for name, info in self._tensors.items()}

    def copies(self, name: str, weight: Weight) -> Iterator[_Copy]:
        """The work of filling `weight`'s target with its part, in pieces that any thread may do."""
        info = self._tensors[name]
        rows_part, columns_part = (*weight.part, slice(None), slice(None))[:2]
        rows = self._rows(name, info)[rows_part]
        step = max(1, _CHUNK // max(1, int(np.prod(info.shape[1:]))))
        kind = GGMLQuantizationType(info.ggml_type)
        for at in range(0, len(rows), step):
            yield _Copy(rows[at : at + step], kind, columns_part, weight.target[at : at + step])

    def _rows(self, name: str, info: TensorInfo) -> NDArray[np.uint8]:
        """The tensor's bytes [rows, bytes], in the row order of Hugging Face checkpoints."""
        data = self._bytes[info.offset : info.offset + _num_bytes(info)]
        rows = data.reshape(info.shape[0], -1)
        heads = next((heads for part, heads in self._heads.items() if part in name), 0)
        if not heads:
            return rows
        # Per head, the file has the two halves of the rotary pairs interleaved.
        pairs = rows.reshape(heads, -1, 2, rows.shape[1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

    def _check(self, name: str, info: TensorInfo) -> None:
        what = f"model: {str(self._path)!r} has tensor {name!r}"
        if info.ggml_type not in _readable_formats():
            kinds = {kind.value: kind.name for kind in GGMLQuantizationType}
            kind = kinds.get(info.ggml_type, str(info.ggml_type))
            raise ConfigError(f"{what} in format {kind}, which cannot be read", parameter="model", value=kind)
        if (end := info.offset + _num_bytes(info)) > len(self._bytes):
            size = len(self._bytes)
            raise ConfigError(
                f"{what} up to byte {end}, but ends at byte {size}: the file is truncated",
                parameter="model",
                value=size,
                limit=end,
            )


class _Copy:
    """Dequantize some rows into their place."""

    def __init__(
        self, rows: NDArray[np.uint8], kind: GGMLQuantizationType, columns: slice, target: Tensor
    ) -> None:
        self._rows, self._kind, self._columns, self._target = rows, kind, columns, target

    def __call__(self) -> None:
        values = dequantize(self._rows, self._kind)
        if not values.flags.writeable:  # float32 rows are the file itself, and torch wants what it may write
            values = values.copy()
        self._target.copy_(torch.from_numpy(values)[:, self._columns].view(self._target.shape))


@cache
def _readable_formats() -> frozenset[int]:
    """Those whose blocks the gguf package can dequantize."""
    readable = set()
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        readable.add(kind.value)
    return frozenset(readable)


def _num_bytes(info: TensorInfo) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(info.ggml_type)]
    elements = int(np.prod(info.shape))
    return int(elements // block * size)


def _hf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    match stem.split("."):
        case ["blk", layer, part] if part in _INNER:
            return f"model.layers.{layer}.{_INNER[part]}.{kind}"
    return name


def _permuted_heads(metadata: dict[str, Any]) -> dict[str, int]:
    """Part of a tensor's name -> number of heads, for the projections whose rows the file permutes."""
    if metadata.get("general.architecture") != "llama":
        return {}
    heads = int(metadata["llama.attention.head_count"])
    kv_heads = int(metadata.get("llama.attention.head_count_kv", heads))
    return {".q_proj.": heads, ".k_proj.": kv_heads}
