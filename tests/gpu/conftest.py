"""Everything here needs a CUDA device."""

from __future__ import annotations

import json
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


def make_gpu_config(folder: Path, **options: Any) -> EngineConfig:
    """A configuration for the checkpoint in `folder`, small where nothing else is asked for."""
    hf_config = json.loads((folder / "config.json").read_text())
    settings: dict[str, Any] = {
        "model": str(folder),
        "model_path": str(folder),
        "served_model_name": "test",
        "tokenizer": None,
        "hf_config": hf_config,
        "architecture": hf_config["architectures"][0],
        "vocab_size": hf_config["vocab_size"],
        "eos_token_ids": [],
        "default_sampling": {},
        "dtype": "bfloat16",
        "device": "cuda",
        "load_format": "safetensors",
        "seed": 0,
        "tensor_parallel_size": 1,
        "enforce_eager": False,
        "max_model_len": 512,
        "max_model_len_is_explicit": True,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        "scheduling_policy": "fcfs",
        "block_size": 16,
        "num_gpu_blocks_override": None,
        "gpu_memory_utilization": 0.5,
        "kv_cache_memory_bytes": 1 << 28,
        "max_queued_requests": 10_000,
        "max_queued_tokens": 1_000_000,
        "log_stats": False,
        "max_replays": 1,
        "max_logprobs": 20,
        "logprobs_mode": "raw_logprobs",
    }
    return EngineConfig(**(settings | options))


@pytest.fixture(scope="session")
def gpu_config() -> Any:
    return make_gpu_config
