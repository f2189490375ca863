"""How many KV blocks the engine has, and what context length they allow."""

from __future__ import annotations

from collections.abc import Sequence

from ..ipc.config import EngineConfig
from ..ipc.errors import ConfigError
from ..ipc.messages import Allocate, Loaded


def size_cache(config: EngineConfig, loaded: Sequence[Loaded]) -> Allocate:
    """What every rank allocates: as many blocks as the smallest has room for, and the context they hold.

    Raises ConfigError when there is no room for an explicit `max_model_len`, or for a single block.
    """
    smallest = min(loaded, key=lambda rank: rank.num_blocks)
    override = config.num_gpu_blocks_override
    num_blocks = smallest.num_blocks if override is None else override
    size, wanted = config.block_size, config.max_model_len
    source = smallest.arithmetic if override is None else f"num_gpu_blocks_override {override}"
    if num_blocks < 1:
        message = f"no room for a single KV block of {size} tokens on rank {smallest.rank}: {source}"
        raise ConfigError(message, parameter="gpu_memory_utilization", value=num_blocks, limit=1)
    room = num_blocks * size
    if room < wanted and config.max_model_len_is_explicit:
        blocks = -(-wanted // size)
        message = (
            f"max_model_len {wanted} needs {blocks} KV blocks of {size} tokens "
            f"({blocks * smallest.block_bytes / 2**20:.1f} MiB); there are {num_blocks} ({room} tokens, "
            f"{num_blocks * smallest.block_bytes / 2**20:.1f} MiB): {source}"
        )
        raise ConfigError(message, parameter="max_model_len", value=wanted, limit=room)
    return Allocate(num_blocks, min(wanted, room))
