"""Everything here needs a CUDA device."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from headrace.ipc.config import EngineConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def gpu_config(make_config: Callable[..., EngineConfig]) -> Callable[..., EngineConfig]:
    """`gpu_config(folder, **options)`: for the checkpoint there, small where nothing else is asked for."""

    def make(folder: Path, **options: Any) -> EngineConfig:
        hf_config = json.loads((folder / "config.json").read_text())
        settings: dict[str, Any] = {
            "model": str(folder),
            "model_path": str(folder),
            "served_model_name": "test",
            "hf_config": hf_config,
            "architecture": hf_config["architectures"][0],
            "vocab_size": hf_config["vocab_size"],
            "dtype": "bfloat16",
            "device": "cuda",
            "load_format": "safetensors",
            "enforce_eager": False,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 256,
            "block_size": 16,
            "num_gpu_blocks_override": None,
            "gpu_memory_utilization": 0.5,
            "kv_cache_memory_bytes": 1 << 28,
        }
        return make_config(**(settings | options))

    return make
