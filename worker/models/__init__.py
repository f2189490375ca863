"""Model definitions: one file per family, found by the architecture's name and imported on use."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

import torch

from ...ipc.errors import ConfigError
from ..layers import Place, RowWise
from ..parallel import TensorParallel
from .causal_lm import CausalLM

_MODULES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architecture, as in `config.json`, to module. A module has `build(hf_config, place, max_model_len)`."""


class _Module(Protocol):
    def build(self, hf_config: dict[str, Any], place: Place, max_model_len: int) -> CausalLM: ...


def build_model(
    architecture: str,
    hf_config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    tp: TensorParallel,
    max_model_len: int,
    row_wise: RowWise | None = None,
) -> CausalLM:
    """This rank's share of a model, its parameters uninitialised.

    Raises ConfigError for an unknown architecture, for options of the config that are not supported, and for
    sizes that the ranks cannot share.
    """
    if architecture not in _MODULES:
        known = ", ".join(_MODULES)
        raise ConfigError(
            f"Architecture {architecture!r} is not supported; supported are {known}",
            parameter="model",
            value=architecture,
            limit=known,
        )
    if hf_config.get("quantization_config"):
        method = hf_config["quantization_config"].get("quant_method", "unknown")
        raise ConfigError(
            f"The model's weights are quantized ({method}), which is not supported; GGUF files are",
            parameter="quantization",
            value=method,
            limit="unquantized, or GGUF",
        )
    module: _Module = import_module(f".{_MODULES[architecture]}", __name__)
    return module.build(hf_config, Place(dtype, device, tp, row_wise or RowWise()), max_model_len)
