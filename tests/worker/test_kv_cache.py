"""Sizing of the KV cache: which number wins, and what the arithmetic says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from headrace.ipc.errors import ConfigError
from headrace.worker.kv_cache import GIB, Budget, cpu_budget, cuda_budget, size_cache

if TYPE_CHECKING:
    from tests.worker.conftest import MakeConfig

MIB = 1 << 20


def budget(num_bytes: int) -> Budget:
    return Budget(num_bytes, "said so", "kv_cache_memory_bytes")


def test_the_budget_is_spent_on_whole_blocks(make_config: MakeConfig) -> None:
    size = size_cache(make_config(num_gpu_blocks_override=None), MIB, budget(10 * MIB + 5))
    assert size.num_blocks == 10
    assert size.block_bytes == MIB
    assert "10 blocks, 40 tokens" in size.arithmetic
    assert "said so" in size.arithmetic


def test_no_more_than_the_requests_can_use(make_config: MakeConfig) -> None:
    config = make_config(num_gpu_blocks_override=None, max_num_seqs=3, max_model_len=9, block_size=4)
    size = size_cache(config, MIB, budget(GIB))
    assert size.num_blocks == 9
    assert "3 requests of 9 tokens" in size.arithmetic


def test_the_override_wins(make_config: MakeConfig) -> None:
    size = size_cache(make_config(num_gpu_blocks_override=77), MIB, budget(0))
    assert size.num_blocks == 77
    assert "num_gpu_blocks_override=77" in size.arithmetic


def test_too_little_for_a_block_names_the_parameter(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"No room for a single KV block: 0\.00 GiB") as caught:
        size_cache(make_config(num_gpu_blocks_override=None), MIB, budget(MIB - 1))
    assert caught.value.parameter == "kv_cache_memory_bytes"
    assert caught.value.value == str(MIB - 1)
    assert caught.value.limit == f">= {MIB} bytes"


def test_cpu_budget(make_config: MakeConfig) -> None:
    assert cpu_budget(make_config(kv_cache_memory_bytes=123)).num_bytes == 123
    alone = cpu_budget(make_config())
    assert 0 < alone.num_bytes <= 4 * GIB
    shared = cpu_budget(make_config(tensor_parallel_size=4))
    assert shared.num_bytes <= GIB
    assert "shared by 4 ranks" in shared.why


def test_cuda_budget_counts_only_what_was_free(make_config: MakeConfig) -> None:
    """80 GiB of which others hold 30: 10 GiB of weights, 40 free."""
    config = make_config(gpu_memory_utilization=0.8)
    room = cuda_budget(config, free=40 * GIB, total=80 * GIB, held=10 * GIB, profiled=5 * GIB)
    assert room.num_bytes == 25 * GIB
    assert room.parameter == "gpu_memory_utilization"
    nothing = cuda_budget(config, free=GIB, total=80 * GIB, held=10 * GIB, profiled=5 * GIB)
    assert nothing.num_bytes == 0
