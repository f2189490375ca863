"""Which models are on this machine: the demo and what the Hugging Face cache holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import huggingface_hub.errors

from ..ipc.errors import ConfigError
from .demo import DEMO, demo_cache_path, is_fetched
from .model_files import read_json


class LocalModel(NamedTuple):
    """What `model` may be called without a download."""

    name: str
    architecture: str
    num_bytes: int
    path: Path


def local_models() -> Iterator[LocalModel]:
    """The demo if it has been fetched, then every cached snapshot with a config.json and safetensors."""
    try:
        demo = demo_cache_path()
    except ConfigError:  # there is no home, and so no demo in it
        pass
    else:
        if is_fetched(demo):
            yield LocalModel("demo", "LlamaForCausalLM", DEMO.size, demo)
    try:
        cache = huggingface_hub.scan_cache_dir()
    except (huggingface_hub.errors.CacheNotFound, RuntimeError):  # there is none yet, or no home for it
        return
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        for revision in repo.revisions:
            folder = revision.snapshot_path
            if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
                yield LocalModel(repo.repo_id, _architecture(folder), revision.size_on_disk, folder)


def _architecture(folder: Path) -> str:
    try:
        names = read_json(folder / "config.json", "model", "a model's configuration").get("architectures")
    except ConfigError:
        return "unreadable config.json"
    return str(names[0]) if isinstance(names, list) and names else "unknown"


def table() -> str:
    """For people, a line a model."""
    models = list(local_models())
    if not models:
        return "none yet; `--model demo` and Hugging Face ids are fetched when they are first used"
    width = max(len(model.name) for model in models)
    kind = max(len(model.architecture) for model in models)
    return "\n".join(
        f"{model.name:{width}}  {model.architecture:{kind}}  {model.num_bytes / 1e9:6.2f} GB  {model.path}"
        for model in models
    )
