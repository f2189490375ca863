"""Backends that block until the tokens are there, behind the interface of those that run ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ..ipc.config import EngineConfig
from ..ipc.messages import Argument, Logprobs, PromptLogprobs, StepPlan, StepResult
from .constraints import ConstraintBuilder, Constraints
from .kv_cache import CacheSize
from .slots import I32, Batch, Slots, new_blocks


class Executed(NamedTuple):
    """What a batch brought."""

    tokens: I32
    """The token of each row in `batch.sampling`."""
    logprobs: Logprobs | None = None
    prompt_logprobs: Sequence[PromptLogprobs] = ()


class Backend(Protocol):
    """What turns batches into tokens. `load`, `allocate`, `warm_up`, then `execute` for every plan."""

    def load(self, progress: Callable[[str], None]) -> CacheSize:
        """Get ready to say how large the KV cache may be; names its phases to `progress`."""

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        """Make the KV cache. No position will reach `max_model_len`."""

    def warm_up(self) -> None:
        """Do what the first step would otherwise wait for."""

    def release(self, keep_weights: bool) -> None:
        """Give up the KV cache and, unless `keep_weights`, the weights."""

    def restore_weights(self) -> None:
        """Have the weights again."""

    def memory(self) -> dict[str, Argument]:
        """Bytes, by what they hold."""

    def weights_checksum(self) -> str:
        """SHA-256 of this rank's weights, hexadecimal. Raises RequestError when there are none."""

    def poison(self, blocks: list[int]) -> None:
        """Overwrite these blocks of the KV cache."""

    def execute(self, slots: Slots, batch: Batch) -> Executed:
        """Compute the batch. Leaves `slots` unchanged."""


class Done(NamedTuple):
    """A step that has run."""

    step_result: StepResult

    def ready(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self.step_result


class InOrder:
    """A runner that computes each plan before it takes the next; owns the slot table."""

    def __init__(self, config: EngineConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self.load = backend.load
        self.warm_up = backend.warm_up
        self.restore_weights = backend.restore_weights
        self.memory = backend.memory
        self.weights_checksum = backend.weights_checksum
        self._size = (0, 0)
        self._build_constraints = ConstraintBuilder(config)
        self._slots: Slots

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        config = self._config
        self._size = (num_blocks, max_model_len)
        constraints = Constraints(self._build_constraints)
        self._slots = Slots(config.max_num_seqs, max_model_len, config.block_size, num_blocks, constraints)
        self._backend.allocate(num_blocks, max_model_len)

    def submit(self, plan: StepPlan) -> Done:
        if self._config.poison_blocks:
            self._backend.poison(new_blocks(plan, self._config.block_size))
        batch = self._slots.apply(plan)
        tokens, logprobs, prompts = self._backend.execute(self._slots, batch)
        self._slots.commit(batch, tokens)
        failed = self._slots.constraints.failed(batch.slots[batch.sampling])
        return Done(StepResult(plan.step, tokens.tobytes(), failed, logprobs, list(prompts)))

    def release(self, keep_weights: bool) -> None:
        del self._slots
        self._backend.release(keep_weights)

    def restore_cache(self) -> None:
        self.allocate(*self._size)

    def idle(self) -> bool:
        """There is never anything left to prepare."""
        return False

    def use_prepared(self, count: int) -> None:
        raise AssertionError("nothing was prepared")
