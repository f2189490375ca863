"""From a model's name to its files, and from its files to what the engine must know of it.

Reads configuration only: weights are the workers' business, the tokenizer is `tokenizer.py`'s. Everything
that is wrong with a name or a file is a ConfigError that names it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ..ipc.config import EngineConfig
from ..ipc.errors import ConfigError, RequestError
from ..ipc.gguf import read_gguf_header
from .gguf_config import config_from_gguf
from .names import nearest
from .sampling_params import SamplingParams

DEMO = "demo"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
_SAMPLING_KEYS = {
    "repetition_penalty": "repetition_penalty",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "max_new_tokens": "max_tokens",
}
"""The keys of generation_config.json that vLLM takes sampling defaults from, and their names here."""

_DEMO_SAMPLING = {"temperature": 0.2, "top_p": 0.9}
"""What the makers of SmolLM2-135M-Instruct recommend; its GGUF file does not say."""


class ModelFiles(NamedTuple):
    """A model on this machine."""

    path: Path
    """A folder with `config.json`, or a GGUF file; absolute."""
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]
    """Empty when the model brings none."""

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()

    @property
    def has_tokenizer(self) -> bool:
        return self.is_gguf or any((self.path / name).is_file() for name in TOKENIZER_FILES)


def find_model(name: str, *, with_weights: bool = True, parameter: str = "model") -> Path:
    """The folder or GGUF file that `name` means, downloaded if it is a Hugging Face id.

    Tried in this order: "demo", an existing folder, an existing .gguf file, the Hugging Face cache, the hub.
    Raises ConfigError.
    """
    if name == DEMO:
        from .demo import demo_model_path  # noqa: PLC0415 - only who asks for the demo pays for it

        return demo_model_path()
    path = _path(name)
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".gguf":
            limit = "a folder or a .gguf file"
            raise ConfigError(
                f"{parameter}: {name!r} is a file, but not {limit}",
                parameter=parameter,
                value=name,
                limit=limit,
            )
        return path.resolve()
    looks_like_path = name.startswith((".", "/", "~")) or name.endswith(".gguf")
    if looks_like_path or not _HUB_ID.fullmatch(name):
        raise _unknown(name, parameter, "there is no such folder or .gguf file")
    return _from_hub(name, parameter, with_weights)


def read_model(name: str, generation_config: str, *, with_weights: bool = True) -> ModelFiles:
    """Find the model and read its configuration.

    `generation_config` is "auto" (the model's own), "vllm" (none) or a folder that holds one.
    """
    path = find_model(name, with_weights=with_weights)
    if path.is_file():
        hf_config = config_from_gguf(path, read_gguf_header(path))
    else:
        hf_config = read_json(path / "config.json", "model", "a model folder has a config.json")
    if generation_config == "vllm":
        return ModelFiles(path, hf_config, {})
    if name == DEMO and generation_config == "auto":
        return ModelFiles(path, hf_config, _DEMO_SAMPLING)
    folder = path if generation_config == "auto" else _path(generation_config)
    file = folder / "generation_config.json"
    if generation_config == "auto" and not file.is_file():
        return ModelFiles(path, hf_config, {})
    why = '"auto", "vllm" or a folder with a generation_config.json'
    return ModelFiles(path, hf_config, read_json(file, "generation_config", why))


def overridden(files: ModelFiles, config: dict[str, Any], generation: dict[str, Any]) -> ModelFiles:
    """`files` with what is said instead of what `config.json` and `generation_config.json` say."""
    hf_config = files.hf_config | config
    for name, other in ("rope_scaling", "rope_parameters"), ("rope_parameters", "rope_scaling"):
        if name in config and other not in config:  # the same by its old and its new name
            old = hf_config.pop(other, None)
            if isinstance(old, dict):
                hf_config.setdefault("rope_theta", old.get("rope_theta"))
    return files._replace(hf_config=hf_config, generation_config=files.generation_config | generation)


def check_generation(values: dict[str, Any], parameter: str) -> None:
    """Raise ConfigError, in which they are `parameter`, for what says nothing or is out of range."""
    known = ["eos_token_id", *_SAMPLING_KEYS]
    for name in values:
        if name not in known:
            limit = ", ".join(known)
            message = f"{parameter}: {name!r} is not among {limit}{nearest(name, known)}"
            raise ConfigError(message, parameter=parameter, value=name, limit=limit)
    ids = values.get("eos_token_id")
    if ids is not None and not all(type(each) is int for each in (ids if isinstance(ids, list) else [ids])):
        limit = "a token id or a list of them"
        message = f"{parameter}: eos_token_id must be {limit}, got {ids!r}"
        raise ConfigError(message, parameter=parameter, value=ids, limit=limit)
    try:
        SamplingParams(**sampling_of(values))
    except (RequestError, TypeError) as error:
        raise ConfigError(f"{parameter}: {error}", parameter=parameter, value=values) from error


def has_generation(config: EngineConfig, values: dict[str, Any]) -> bool:
    """Whether an engine that runs with `config` does what these values of `check_generation` say."""
    ids = values.get("eos_token_id") or []
    names = {theirs: ours for theirs, ours in _SAMPLING_KEYS.items() if theirs in values}
    return set(ids if isinstance(ids, list) else [ids]) <= set(config.eos_token_ids) and all(
        config.default_sampling.get(ours) == values[theirs] for theirs, ours in names.items()
    )


def read_json(path: Path, parameter: str, expected: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError naming the file and what was `expected`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        reason = error.strerror or str(error)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = f"it is not a JSON object: {error}"
    message = f"{parameter}: cannot read {str(path)!r}: {reason} ({expected})"
    raise ConfigError(message, parameter=parameter, value=path, limit=expected)


def eos_token_ids(files: ModelFiles) -> list[int]:
    """End-of-sequence ids: the configuration's, then those that generation_config.json adds."""
    found: list[int] = []
    for source in (files.hf_config, files.generation_config):
        value = source.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and token not in found:
                found.append(token)
    return found


def default_sampling(files: ModelFiles) -> dict[str, float | int]:
    """The sampling defaults that the model's makers recommend, under `SamplingParams` names."""
    return sampling_of(files.generation_config)


def sampling_of(given: dict[str, Any]) -> dict[str, Any]:
    """What generation_config.json's names say of sampling, under `SamplingParams` names."""
    return {ours: given[theirs] for theirs, ours in _SAMPLING_KEYS.items() if given.get(theirs) is not None}


def _path(name: str) -> Path:
    """`~` and all; where there is no such home, `Path.expanduser` raises."""
    return Path(os.path.expanduser(name))


def _from_hub(name: str, parameter: str, with_weights: bool) -> Path:
    import huggingface_hub  # noqa: PLC0415 - 0.3 s that local models need not pay

    patterns = _SMALL_FILES + (["*.safetensors"] if with_weights else [])
    try:
        cached = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
        if (cached / "config.json").is_file() and (not with_weights or any(cached.glob("*.safetensors"))):
            return cached
    except (OSError, ValueError, RuntimeError):
        pass  # not in the cache, or no home for one: ask the hub
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # its errors share no base: HTTP, offline, gated, not found, bad names
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        looked = "no such folder or .gguf file here, not in the Hugging Face cache, and the hub said"
        raise _unknown(name, parameter, f"{looked}: {reason}") from error


def _unknown(name: str, parameter: str, reason: str) -> ConfigError:
    limit = f'"{DEMO}", a folder, a .gguf file or a Hugging Face id'
    message = f"{parameter}: cannot find {name!r}: {reason} (expected {limit})"
    return ConfigError(message, parameter=parameter, value=name, limit=limit)
