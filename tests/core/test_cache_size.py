"""How many blocks, and what context they allow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from headrace.core.cache_size import size_cache
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import ConfigError
from headrace.ipc.messages import Allocate, Loaded

MakeConfig = Callable[..., EngineConfig]


def loaded(*num_blocks: int) -> list[Loaded]:
    return [Loaded(rank, count, 1 << 20, f"sum of rank {rank}") for rank, count in enumerate(num_blocks)]


def test_the_smallest_rank_decides(make_config: MakeConfig) -> None:
    config = make_config(num_gpu_blocks_override=None, max_model_len=64, block_size=4)
    assert size_cache(config, loaded(30, 20)) == Allocate(20, 64)


def test_the_override_decides_before_the_ranks(make_config: MakeConfig) -> None:
    config = make_config(num_gpu_blocks_override=25, max_model_len=64, block_size=4)
    assert size_cache(config, loaded(30, 20)) == Allocate(25, 64)


def test_the_context_shrinks_to_what_fits_unless_it_was_asked_for(make_config: MakeConfig) -> None:
    changes = {"num_gpu_blocks_override": None, "max_model_len": 64, "block_size": 4}
    relaxed = make_config(**changes, max_model_len_is_explicit=False)
    assert size_cache(relaxed, loaded(10)) == Allocate(10, 40)
    with pytest.raises(ConfigError) as caught:
        size_cache(make_config(**changes), loaded(12, 10))
    for words in ("max_model_len 64", "16 KV blocks of 4", "16.0 MiB", "10 (40 tokens, 10.0 MiB)", "rank 1"):
        assert words in str(caught.value)
    assert (caught.value.parameter, caught.value.value, caught.value.limit) == ("max_model_len", "64", "40")


def test_no_room_at_all(make_config: MakeConfig) -> None:
    config = make_config(num_gpu_blocks_override=None, max_model_len_is_explicit=False)
    with pytest.raises(ConfigError, match="single KV block of 4 tokens on rank 1: sum of rank 1"):
        size_cache(config, loaded(10, 0))
