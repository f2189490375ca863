"""The request slots: everything the worker remembers from step to step, as columns.

Knows the core's plans and applies them; one numpy column per fact, one row per slot, so that a step over
the same requests costs a fixed number of array operations. Does not know models, devices or sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..ipc.messages import Admit, StepPlan
from .constraints import Constraints
from .rules import PromptRow, TokenRules, Wish

I32: TypeAlias = NDArray[np.int32]
I64: TypeAlias = NDArray[np.int64]
F64: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]


@dataclass(slots=True)
class Batch:
    """What one plan runs: row i computes `num_scheduled[i]` tokens of slot `slots[i]`."""

    slots: I64
    num_scheduled: I64
    starts: I64
    """Position of each row's first token; all before it are in the KV cache."""
    ends: I64
    """One past each row's last position."""
    sampling: I64
    """The rows that sample, ascending: those that reach the end of their slot's tokens."""
    one_each: bool
    """Every row computes exactly one token."""
    changed: bool
    """False when slots and requests are those of the batch before, in the same order."""
    admitted: frozenset[int] = frozenset()
    """The slots that this plan filled."""
    prompts: Sequence[PromptRow] = ()
    """The rows of which prompt logprobs are wanted."""


@dataclass(slots=True)
class SamplingColumns:
    """`messages.Sampling` of every slot, a column per field."""

    temperature: F64
    top_p: F64
    top_k: I64
    min_p: F64
    seed: NDArray[np.uint64]
    presence_penalty: F64
    frequency_penalty: F64
    repetition_penalty: F64
    min_tokens: I64
    stop_ids: list[list[int]] = field(default_factory=list)
    """Per slot, the tokens that `min_tokens` holds back."""
    token_rules: dict[int, TokenRules] = field(default_factory=dict)
    """Of the slots that have some."""
    wishes: dict[int, Wish] = field(default_factory=dict)
    """Of the slots that want logprobs."""
    prompt_wishes: dict[int, Wish] = field(default_factory=dict)
    """Of the slots that want prompt logprobs."""

    @classmethod
    def empty(cls, num_slots: int) -> SamplingColumns:
        floats = [np.zeros(num_slots, np.float64) for _ in range(6)]
        temperature, top_p, min_p, presence, frequency, repetition = floats
        top_k, min_tokens = np.zeros(num_slots, np.int64), np.zeros(num_slots, np.int64)
        seed = np.zeros(num_slots, np.uint64)
        stop_ids: list[list[int]] = [[] for _ in range(num_slots)]
        return cls(
            temperature, top_p, top_k, min_p, seed, presence, frequency, repetition, min_tokens, stop_ids
        )

    def set(self, slot: int, admit: Admit) -> None:
        sampling = admit.sampling
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = sampling.top_p
        self.top_k[slot] = sampling.top_k
        self.min_p[slot] = sampling.min_p
        self.seed[slot] = sampling.seed
        self.presence_penalty[slot] = sampling.presence_penalty
        self.frequency_penalty[slot] = sampling.frequency_penalty
        self.repetition_penalty[slot] = sampling.repetition_penalty
        # A grammar holds stop tokens back itself: it knows when nothing else may come.
        self.min_tokens[slot] = 0 if sampling.grammar is not None else sampling.min_tokens
        eos = [] if sampling.eos_token_id is None else [sampling.eos_token_id]
        self.stop_ids[slot] = eos + sampling.stop_token_ids
        for kept in (self.token_rules, self.wishes, self.prompt_wishes):
            kept.pop(slot, None)
        if (rules := TokenRules.of(sampling)) is not None:
            self.token_rules[slot] = rules
        if (wish := Wish.of(sampling)) is not None:
            self.wishes[slot] = wish
        if sampling.prompt_logprobs is not None:
            self.prompt_wishes[slot] = Wish(sampling.prompt_logprobs)

    def prompts(self, slots: I64, starts: I64, ends: I64, num_prompt: I64) -> list[PromptRow]:
        """The rows of which prompt logprobs are wanted. `num_prompt` is by slot, the others by row."""
        if not self.prompt_wishes:
            return []
        counts = np.minimum(ends, num_prompt[slots] - 1) - starts
        return [
            PromptRow(row, slot, int(starts[row]), int(counts[row]), self.prompt_wishes[slot])
            for row, slot in enumerate(slots.tolist())
            if slot in self.prompt_wishes and counts[row] > 0
        ]


class Slots:
    """The slot table. Every inconsistency of a plan is an AssertionError: the core is then not to be trusted.

    Columns (rows: slots): `tokens` int32[., max_model_len], `block_tables` int32[., max_blocks], and int64
    `num_tokens` (prompt and sampled), `num_computed`, `num_prompt`, `num_blocks`.
    """

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        num_kv_blocks: int,
        constraints: Constraints | None = None,
    ) -> None:
        self.block_size = block_size
        self.num_kv_blocks = num_kv_blocks
        max_blocks = -(-max_model_len // block_size)
        # Zeroed memory is not touched before it is used: a long max_model_len costs address space only.
        self.tokens = np.zeros((num_slots, max_model_len), np.int32)
        self.block_tables = np.zeros((num_slots, max_blocks), np.int32)
        self.num_tokens = np.zeros(num_slots, np.int64)
        self.num_computed = np.zeros(num_slots, np.int64)
        self.num_prompt = np.zeros(num_slots, np.int64)
        self.num_blocks = np.zeros(num_slots, np.int64)
        self.in_use = np.zeros(num_slots, np.bool_)
        self.sampling = SamplingColumns.empty(num_slots)
        self.constraints = constraints or Constraints()
        self._rows = np.zeros(0, np.int64)
        self._ones = np.zeros(0, np.int64)
        self._every_row = np.zeros(0, np.int64)

    def apply(self, plan: StepPlan) -> Batch:
        """Take in what the plan changes; returns what it runs."""
        if plan.released:
            released = _ints(plan.released)
            assert self._are_in_use(released), f"step {plan.step} releases a free slot: {released}"
            self.in_use[released] = False
            self.constraints.release(released.tolist())
        for admit in plan.admitted:
            self._admit(admit)
        if plan.granted:
            self._grant(_ints(plan.granted).reshape(-1, 2))
        return self._compose(plan)

    def commit(self, batch: Batch, tokens: I32) -> None:
        """The batch has run: its positions are computed, and `tokens` (one per sampling row) are appended."""
        self.num_computed[batch.slots] = batch.ends
        if len(batch.sampling):
            slots = batch.slots[batch.sampling]
            ends = self.num_tokens[slots]
            self.tokens[slots, ends] = tokens
            self.num_tokens[slots] = ends + 1
            self.constraints.expect(slots, tokens.astype(np.int32).tobytes)

    def history(self, slots: I64, length: int) -> I32:
        """int32 [len(slots), length], the first tokens of these slots."""
        return self.tokens[slots, :length]

    def _admit(self, admit: Admit) -> None:
        slot, tokens, blocks = admit.slot, _ints(admit.tokens), _ints(admit.blocks)
        assert 0 <= slot < len(self.in_use), f"there is no slot {slot}"
        assert not self.in_use[slot], f"slot {slot} is taken"
        assert 0 < admit.num_prompt_tokens <= len(tokens), f"prompt of {admit.num_prompt_tokens} tokens"
        assert 0 <= admit.num_computed < len(tokens), f"{admit.num_computed} of {len(tokens)} tokens computed"
        self._check_blocks(blocks)
        self.in_use[slot] = True
        self.tokens[slot, : len(tokens)] = tokens
        self.num_tokens[slot] = len(tokens)
        self.num_prompt[slot] = admit.num_prompt_tokens
        self.num_computed[slot] = admit.num_computed
        self.block_tables[slot, : len(blocks)] = blocks
        self.num_blocks[slot] = len(blocks)
        self.sampling.set(slot, admit)
        self.constraints.admit(admit)

    def _grant(self, pairs: NDArray[np.int32]) -> None:
        order = np.argsort(pairs[:, 0], kind="stable")
        slots, blocks = pairs[order, 0].astype(np.int64), pairs[order, 1]
        self._check_blocks(blocks)
        assert self._are_in_use(slots), f"blocks granted to a free slot: {slots}"
        # The k-th block of a slot goes k places behind the end of its table.
        index = np.arange(len(slots))
        first = np.ones(len(slots), np.bool_)
        first[1:] = slots[1:] != slots[:-1]
        rank = index - np.maximum.accumulate(np.where(first, index, 0))
        self.block_tables[slots, self.num_blocks[slots] + rank] = blocks
        np.add.at(self.num_blocks, slots, 1)

    def _are_in_use(self, slots: NDArray[Any]) -> bool:
        inside = (slots >= 0) & (slots < len(self.in_use))
        return bool(inside.all() and self.in_use[slots].all())

    def _check_blocks(self, blocks: NDArray[np.int32]) -> None:
        if len(blocks):
            low, high = int(blocks.min()), int(blocks.max())
            assert 0 <= low <= high < self.num_kv_blocks, f"blocks {low}..{high} of {self.num_kv_blocks}"

    def _compose(self, plan: StepPlan) -> Batch:
        if plan.slots is not None:
            self._set_rows(_ints(plan.slots).astype(np.int64))
        rows, one_each, num_scheduled = self._rows, True, self._ones
        if plan.num_tokens is not None:
            num_scheduled = _ints(plan.num_tokens).astype(np.int64)
            assert len(num_scheduled) == len(rows), f"{len(num_scheduled)} counts for {len(rows)} rows"
            assert (num_scheduled > 0).all(), f"rows without tokens: {num_scheduled}"
            one_each = bool((num_scheduled == 1).all())
        changed = plan.slots is not None or bool(plan.admitted) or bool(plan.released)
        assert not changed or self._are_in_use(rows), f"step {plan.step} runs a free slot: {rows}"
        starts, num_tokens = self.num_computed[rows], self.num_tokens[rows]
        ends = starts + num_scheduled
        samples = ends == num_tokens
        assert (ends <= num_tokens).all(), f"step {plan.step} runs past the tokens: {ends} of {num_tokens}"
        room = self.num_blocks[rows] * self.block_size
        assert (ends <= room).all(), f"step {plan.step} runs past the blocks: {ends} of {room} positions"
        sampling = self._every_row if samples.all() else np.flatnonzero(samples)
        admitted = frozenset(admit.slot for admit in plan.admitted)
        prompts = self.sampling.prompts(rows, starts, ends, self.num_prompt)
        return Batch(rows, num_scheduled, starts, ends, sampling, one_each, changed, admitted, prompts)

    def _set_rows(self, rows: I64) -> None:
        assert len(np.unique(rows)) == len(rows), f"a slot runs twice: {rows}"
        self._rows = rows
        self._ones = np.ones(len(rows), np.int64)
        self._every_row = np.arange(len(rows))


def new_blocks(plan: StepPlan, block_size: int) -> list[int]:
    """The blocks that a plan gives out anew: nothing that they held before may be read again."""
    blocks: list[int] = _ints(plan.granted)[1::2].tolist()
    for admit in plan.admitted:
        blocks += _ints(admit.blocks)[admit.num_computed // block_size :].tolist()
    return blocks


def _ints(column: bytes) -> NDArray[Any]:
    return np.frombuffer(column, np.int32)
