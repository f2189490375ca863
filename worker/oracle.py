"""The oracle backend: ipc.oracle's function behind the slot table and a KV cache of its own.

Its "KV" of a position is the oracle's state after that position's token. A step reads the state before its
first position through the block table and writes the states of its own, so a wrong block, a stale prefix
or a lost token changes the stream exactly as it would with a network. Needs no torch.

It can be told to fail, so that recovery can be tested with real processes: `oracle_faults` in the model's
config.json maps "raise", "exit", "hang" and "garbage" to token ids. A prompt that holds such a token makes
the worker do that when it is computed. And it can be told to take its time: a step lasts at least
`oracle_step_seconds`, so that the engine can be measured under a model of any speed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..ipc.config import EngineConfig
from ..ipc.errors import RequestError
from ..ipc.messages import Argument, Logprobs, PromptLogprobs, pack
from ..ipc.oracle import U64, absorb, next_tokens, oracle_logprobs
from .in_order import Executed
from .kv_cache import POISON, CacheSize, cpu_budget, size_cache
from .rules import Wish
from .slots import I32, I64, Batch, Slots

_BASE = absorb(np.ones(1, np.uint64), np.array([-1], np.int32))[0]
"""The polynomial's base: absorbing -1 into 1 multiplies by it and adds nothing."""
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


class OracleBackend:
    """A worker's backend without a model; every rank computes the same."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._faults: dict[str, int] = config.hf_config.get("oracle_faults", {})
        self._step_seconds = float(config.hf_config.get("oracle_step_seconds", 0.0))
        self._states = np.zeros((0, config.block_size), np.uint64)  # [num_blocks, block_size]
        # BASE**i and BASE**-i, as far as the longest chunk
        self._powers = _powers(_BASE, config.max_num_batched_tokens + 1)
        self._inverses = _powers(_INVERSE, config.max_num_batched_tokens + 1)

    def load(self, progress: Callable[[str], None]) -> CacheSize:
        block_bytes = self._config.block_size * self._states.itemsize
        return size_cache(self._config, block_bytes, cpu_budget(self._config))

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        self._states = np.zeros((num_blocks, self._config.block_size), np.uint64)

    def warm_up(self) -> None:
        """Nothing to warm."""

    def release(self, keep_weights: bool) -> None:
        self._states = np.zeros((0, self._config.block_size), np.uint64)

    def restore_weights(self) -> None:
        """There are none."""

    def poison(self, blocks: list[int]) -> None:
        self._states[blocks] = int(POISON)

    def memory(self) -> dict[str, Argument]:
        return {"weights_bytes": 0, "kv_cache_bytes": self._states.nbytes}

    def weights_checksum(self) -> str:
        raise RequestError("the oracle has no weights", parameter="load_format", value="oracle")

    def execute(self, slots: Slots, batch: Batch) -> Executed:
        """The tokens of the batch's sampling rows."""
        began = time.monotonic()
        states = np.zeros(len(batch.slots), np.uint64)  # after each row's last token
        if batch.one_each and not batch.admitted:
            self._decode(slots, batch.slots, batch.starts, states, None)
        else:
            self._mixed(slots, batch, states)
        rows = batch.sampling
        sampling_slots = batch.slots[rows]
        positions = batch.ends[rows].astype(np.uint64)
        seeds = slots.sampling.seed[sampling_slots]
        tokens = next_tokens(states[rows], seeds, positions, self._config.vocab_size)
        for fault, token in self._faults.items():
            if any(token in slots.tokens[slot, : slots.num_prompt[slot]] for slot in batch.admitted):
                tokens += _fail(fault, self._config.vocab_size)
        executed = Executed(tokens, self._logprobs(slots, batch, tokens), self._prompt_logprobs(slots, batch))
        time.sleep(max(0.0, began + self._step_seconds - time.monotonic()))
        return executed

    def _logprobs(self, slots: Slots, batch: Batch, tokens: I32) -> Logprobs | None:
        wishes = slots.sampling.wishes
        if not wishes:
            return None
        places = batch.ends[batch.sampling].tolist()
        sampling = zip(batch.slots[batch.sampling].tolist(), tokens.tolist(), places, strict=True)
        rows = [
            (row, token, place, wishes[slot])
            for row, (slot, token, place) in enumerate(sampling)
            if slot in wishes
        ]
        return _columns(rows, self._config.vocab_size) if rows else None

    def _prompt_logprobs(self, slots: Slots, batch: Batch) -> list[PromptLogprobs]:
        messages: list[PromptLogprobs] = []
        for row, slot, start, length, wish in batch.prompts:
            places = range(start + 1, start + length + 1)
            rows = [(place, int(slots.tokens[slot, place]), place, wish) for place in places]
            messages.append(PromptLogprobs(row, _columns(rows, self._config.vocab_size)))
        return messages

    def _mixed(self, slots: Slots, batch: Batch, states: U64) -> None:
        """Running requests' single tokens at once, then the others one by one in the plan's order.

        A request may hit prefix blocks that another row of the same plan fills. A network writes all KV
        before any of it is read; here a state needs the one before it, and the plan names the filling row
        first.
        """
        new = np.isin(batch.slots, list(batch.admitted))
        alone = np.flatnonzero((batch.num_scheduled > 1) | new)
        together = np.flatnonzero((batch.num_scheduled == 1) & ~new)
        self._decode(slots, batch.slots[together], batch.starts[together], states, together)
        for row in alone.tolist():
            start, end = int(batch.starts[row]), int(batch.ends[row])
            states[row] = self._chunk(slots, int(batch.slots[row]), start, end)

    def _decode(self, slots: Slots, rows: I64, positions: I64, states: U64, out: I64 | None) -> None:
        tables, size = slots.block_tables, self._config.block_size
        before = positions - 1
        previous = self._states[tables[rows, before // size], before % size]
        if not positions.all():
            previous[positions == 0] = 0
        after = absorb(previous, slots.tokens[rows, positions])
        self._states[tables[rows, positions // size], positions % size] = after
        states[slice(None) if out is None else out] = after

    def _chunk(self, slots: Slots, slot: int, start: int, end: int) -> np.uint64:
        table, size = slots.block_tables[slot], self._config.block_size
        before = np.uint64(0)
        if start:
            before = self._states[table[(start - 1) // size], (start - 1) % size]
        # state[i] = BASE**(i+1) * (before + sum over j <= i of (token[j] + 1) * BASE**-(j+1)), modulo 2**64
        terms = (slots.tokens[slot, start:end].astype(np.uint64) + np.uint64(1)) * self._inverses[
            1 : end - start + 1
        ]
        after: NDArray[np.uint64] = (np.cumsum(terms, dtype=np.uint64) + before) * self._powers[
            1 : end - start + 1
        ]
        positions = np.arange(start, end)
        self._states[table[positions // size], positions % size] = after
        return np.uint64(after[-1])


def _fail(fault: str, vocab_size: int) -> int:
    """Do what the fault's name says; returns what to add to the tokens."""
    if fault == "raise":
        raise RuntimeError("the oracle was told to fail")
    if fault == "exit":
        os._exit(3)
    while fault == "hang":
        time.sleep(60)
    return vocab_size


def _columns(rows: Sequence[tuple[int, int, int, Wish]], vocab_size: int) -> Logprobs:
    """Of each row: its number, the chosen token, its position, and what is wanted."""
    ids = [
        np.array([token, *(wish.token_ids or (token + np.arange(wish.most)) % vocab_size)])
        for _, token, _, wish in rows
    ]
    found = [
        oracle_logprobs(np.array(token), np.array(place), tokens, vocab_size)
        for (_, token, place, _), tokens in zip(rows, ids, strict=True)
    ]
    return Logprobs(
        rows=pack(row for row, *_ in rows),
        counts=pack(len(tokens) for tokens in ids),
        token_ids=np.concatenate(ids).astype(np.int32).tobytes(),
        values=np.concatenate([values for values, _ in found]).tobytes(),
        ranks=np.concatenate([ranks for _, ranks in found]).tobytes(),
    )


def _powers(base: np.uint64, count: int) -> U64:
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)
