"""How many KV blocks this rank can hold, and the arithmetic behind it as a sentence.

Knows bytes and the configuration; the measuring of a GPU and the tensors themselves are the runner's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ipc.config import EngineConfig
from ..ipc.errors import ConfigError
from .control_group import available_memory

GIB = 1 << 30
_CPU_DEFAULT = 4 * GIB
"""Most that a CPU cache takes unasked."""
POISON = 1e4
"""Written into blocks that must not be read: it spoils what reads it, and a mask still makes it nothing."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The answer: what `messages.Loaded` reports."""

    num_blocks: int
    block_bytes: int
    arithmetic: str


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that this rank's cache may take, and where the number comes from."""

    num_bytes: int
    why: str
    parameter: str


def cpu_budget(config: EngineConfig) -> Budget:
    """`kv_cache_memory_bytes`, or a share of the memory that is free now. Shared by the ranks of a host."""
    if config.kv_cache_memory_bytes is not None:
        return _asked_for(config.kv_cache_memory_bytes)
    available, ranks = available_memory(), config.tensor_parallel_size
    why = f"the smaller of 4 GiB and half of the {available / GIB:.2f} GiB of available memory"
    if ranks > 1:
        why += f", shared by {ranks} ranks"
    return Budget(min(_CPU_DEFAULT, available // 2) // ranks, why, "kv_cache_memory_bytes")


def cuda_budget(config: EngineConfig, *, free: int, total: int, held: int, profiled: int) -> Budget:
    """What is left of this GPU.

    Args:
        free: bytes free now, with the weights loaded; what other processes hold is not in it.
        total: bytes of the device.
        held: bytes that this process has allocated already (weights).
        profiled: bytes that a step of `max_num_batched_tokens` needed on top of `held`.
    """
    if config.kv_cache_memory_bytes is not None:
        return _asked_for(config.kv_cache_memory_bytes)
    share = config.gpu_memory_utilization
    usable = int((free + held) * share) - held - profiled
    why = (
        f"gpu_memory_utilization={share} of the {(free + held) / GIB:.2f} GiB that were free "
        f"of {total / GIB:.2f} GiB, "
        f"less {held / GIB:.2f} GiB of weights and {profiled / GIB:.2f} GiB for a step of "
        f"{config.max_num_batched_tokens} tokens"
    )
    return Budget(max(usable, 0), why, "gpu_memory_utilization")


def size_cache(config: EngineConfig, block_bytes: int, budget: Budget) -> CacheSize:
    """Blocks of `block_bytes` (all layers of this rank) that fit `budget`.

    Never more than `max_num_seqs` requests of `max_model_len` can use; `num_gpu_blocks_override` wins over
    everything. Raises ConfigError when not even one block fits.
    """
    each = f"{config.block_size} tokens of {block_bytes / (1 << 20):.3f} MiB per block"
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
        return CacheSize(num_blocks, block_bytes, f"num_gpu_blocks_override={num_blocks}, {each}")
    useful = config.max_num_seqs * -(-config.max_model_len // config.block_size)
    num_blocks = min(budget.num_bytes // block_bytes, useful)
    arithmetic = f"{budget.num_bytes / GIB:.2f} GiB for the KV cache ({budget.why}), {each}"
    if num_blocks < 1:
        raise ConfigError(
            f"No room for a single KV block: {arithmetic}",
            parameter=budget.parameter,
            value=budget.num_bytes,
            limit=f">= {block_bytes} bytes",
        )
    arithmetic += f": {num_blocks} blocks, {num_blocks * config.block_size} tokens"
    if num_blocks == useful:
        arithmetic += f" (all that {config.max_num_seqs} requests of {config.max_model_len} tokens can use)"
    return CacheSize(num_blocks, block_bytes, arithmetic)


def _asked_for(num_bytes: int) -> Budget:
    return Budget(num_bytes, f"kv_cache_memory_bytes={num_bytes}", "kv_cache_memory_bytes")
