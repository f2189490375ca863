"""Fixtures that several folders share: a configuration of the oracle, small unless told otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from headrace.ipc.config import EngineConfig

# As the workers do, for tests that compute in their own process: torch's threads must not spin on two cores.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Kernels run in Triton's interpreter where there is no GPU. Triton reads it when it is first imported, by
# whichever test module comes first.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

DEFAULTS: dict[str, Any] = {
    "model": "oracle",
    "model_path": "",
    "served_model_name": "oracle",
    "tokenizer": None,
    "hf_config": {},
    "architecture": "Oracle",
    "vocab_size": 1000,
    "eos_token_ids": [],
    "default_sampling": {},
    "dtype": "float32",
    "device": "cpu",
    "load_format": "oracle",
    "seed": 0,
    "tensor_parallel_size": 1,
    "enforce_eager": True,
    "max_model_len": 64,
    "max_model_len_is_explicit": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "scheduling_policy": "fcfs",
    "block_size": 4,
    "num_gpu_blocks_override": 16,
    "gpu_memory_utilization": 0.9,
    "kv_cache_memory_bytes": None,
    "log_stats": False,
}


@pytest.fixture(scope="session")
def make_config() -> Callable[..., EngineConfig]:
    """`make_config(**changes)`"""

    def make(**changes: Any) -> EngineConfig:
        return EngineConfig(**(DEFAULTS | changes))

    return make
