"""`headrace explain-config`: the resolved configuration, and where each value came from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..ipc.config import EngineConfig
from .engine_args import AsyncEngineArgs, resolve

ARGUMENT = {"log_stats": "disable_log_stats", "tokenizer_json": "tokenizer"}
"""Values that have another name as an argument."""
_OTHERS = {
    "tokenizer": ["skip_tokenizer_init"],
    "tokenizer_json": ["skip_tokenizer_init"],
    "hf_config": ["hf_overrides"],
    "default_sampling": ["override_generation_config", "generation_config"],
}
"""Arguments that values come from besides their own; the first that is given is told."""
FOUND = {
    "model_path": "where the model was found",
    "served_model_name": "the model's name",
    "tokenizer": "the model's files",
    "hf_config": "config.json, or the GGUF header",
    "architecture": "config.json: architectures",
    "vocab_size": "config.json: vocab_size",
    "eos_token_ids": "generation_config.json and config.json: eos_token_id",
    "default_sampling": "generation_config.json; for the demo what its makers recommend",
    "dtype": "config.json: dtype, and what the device is good at",
    "device": "/dev/nvidiactl and CUDA_VISIBLE_DEVICES",
    "load_format": "the model's files",
    "max_model_len": "config.json: max_position_embeddings, scaled; lowered to what the KV cache holds",
    "max_model_len_is_explicit": "whether --max-model-len is given",
    "max_num_batched_tokens": "default on this device",
    "tokenizer_json": "the tokenizer",
}
"""Where a value comes from that no argument gives."""
_WIDEST = 60


class Explained(msgspec.Struct, frozen=True):
    """One value of the configuration."""

    value: Any
    source: str


def explain(given: Mapping[str, Any]) -> dict[str, Explained]:
    """Every field of the configuration that these engine arguments lead to. Raises ConfigError."""
    config = resolve(AsyncEngineArgs(**given))
    return {
        field.name: Explained(getattr(config, field.name), _source(field.name, given))
        for field in msgspec.structs.fields(EngineConfig)
    }


def table(explained: dict[str, Explained]) -> str:
    """For a terminal: a line for each value; long ones are cut (`--json` has all of them)."""
    shown = {name: _shown(each.value) for name, each in explained.items()}
    widths = max(map(len, shown)), max(map(len, shown.values()))
    return "\n".join(
        f"{name:<{widths[0]}}  {shown[name]:<{widths[1]}}  {each.source}" for name, each in explained.items()
    )


def _source(name: str, given: Mapping[str, Any]) -> str:
    argument = ARGUMENT.get(name, name)
    if argument in given:
        return _flag(argument)
    said = [_flag(other) for other in _OTHERS.get(name, ()) if other in given]
    return said[0] if said else FOUND.get(name, "default")


def _flag(argument: str) -> str:
    return f"--{argument.replace('_', '-')}"


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
