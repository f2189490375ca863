"""What the runner and the weight loader ask of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from ...ipc.errors import ConfigError
from ...kernels.paged_attention import AttentionMetadata
from ..layers import Weights

LayerCache: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [num_blocks, block_size, num_kv_heads, head_dim]."""


class CausalLM(nn.Module, ABC):
    """One rank's share of a decoder-only language model."""

    num_layers: int
    layers: nn.ModuleList
    num_kv_heads: int
    """Of this rank."""
    head_dim: int
    vocab_size: int

    ignored_weights: tuple[str, ...] = ()
    """Endings of checkpoint names that are no parameters: buffers that some checkpoints carry."""

    @abstractmethod
    def forward(
        self, input_ids: Tensor, positions: Tensor, cache: Sequence[LayerCache], meta: AttentionMetadata
    ) -> Tensor:
        """Final hidden states [tokens, hidden_size] of a step; writes the step's keys and values to `cache`.

        Args:
            input_ids, positions: int64 [tokens]
            cache: one entry per layer.
        """

    @abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] to float32 [rows, vocab_size], on all ranks."""

    @abstractmethod
    def weights(self) -> Weights:
        """Every tensor that a checkpoint must hold."""

    def canonical_name(self, name: str) -> str:
        """The name in `weights` of a checkpoint's tensor: some families' checkpoints differ in a prefix."""
        return name


def require(hf_config: dict[str, Any], **supported: object) -> None:
    """Raise ConfigError when an option is present in the config and differs from the one supported value."""
    for name, value in supported.items():
        if hf_config.get(name, value) != value:
            raise ConfigError(
                f"{name} {hf_config[name]!r} of the model's config is not supported, only {value!r}",
                parameter=name,
                value=hf_config[name],
                limit=value,
            )


def size_of(hf_config: dict[str, Any], name: str) -> int:
    """The config's positive integer `name`. Raises ConfigError when there is none."""
    value = hf_config.get(name)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConfigError(
        f"{name} of the model's config is {value!r}, not a positive integer",
        parameter=name,
        value=value,
        limit="a positive integer",
    )


def refuse_sliding_window(window: int | None, max_model_len: int) -> None:
    """Raise ConfigError when a sequence could outgrow the model's attention window, if it has one."""
    if window is None or window >= max_model_len:
        return
    raise ConfigError(
        f"max_model_len {max_model_len} exceeds the model's sliding attention window of {window} tokens; "
        f"sliding windows are not supported",
        parameter="max_model_len",
        value=max_model_len,
        limit=window,
    )


def check_multiple(name: str, value: int, factor: int) -> None:
    """Raise ConfigError when the config's `name` is no multiple of `factor`."""
    if value % factor:
        raise ConfigError(
            f"{name} of the model's config is {value}, not a multiple of {factor}",
            parameter=name,
            value=value,
            limit=f"a multiple of {factor}",
        )
