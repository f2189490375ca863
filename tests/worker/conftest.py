"""Configurations for workers, and slot tables filled through real plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from headrace.ipc.config import EngineConfig

ORACLE: dict[str, Any] = {
    "model": "oracle",
    "model_path": "/nowhere",
    "served_model_name": "oracle",
    "tokenizer": None,
    "hf_config": {},
    "architecture": "LlamaForCausalLM",
    "vocab_size": 1000,
    "eos_token_ids": [2],
    "default_sampling": {},
    "dtype": "float32",
    "device": "cpu",
    "load_format": "oracle",
    "seed": 0,
    "tensor_parallel_size": 1,
    "enforce_eager": False,
    "max_model_len": 256,
    "max_model_len_is_explicit": False,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "scheduling_policy": "fcfs",
    "block_size": 4,
    "num_gpu_blocks_override": 256,
    "gpu_memory_utilization": 0.9,
    "kv_cache_memory_bytes": None,
    "log_stats": False,
}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., EngineConfig]:
    """An oracle's configuration, with any field changed."""
    return lambda **changes: EngineConfig(**{**ORACLE, **changes})
