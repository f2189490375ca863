"""The request slots where the device can reach them: tokens, block tables and sampling parameters as tensors.

Knows the core's plans and applies them. The device alone knows the tokens that it samples and feeds back to
itself; the host keeps only lengths, and those lazily: a plan that changes nothing costs it the same few
operations for one request as for a thousand. Does not know models, sampling or graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..ipc.errors import ConfigError
from ..ipc.messages import Admit, Sampling, StepPlan
from ..kernels.copy_segments import copy_segments
from .constraints import Constraints
from .rules import PromptRow, TokenRules, Wish
from .slots import I32, I64, Bools, SamplingColumns
from .staging import Staging, upload

NUM_COLUMNS = 8
"""int32 words that a slot has for its length and what its draw needs."""
NUM_COMPUTED, TEMPERATURE, SEED, TOP_P, TOP_K, LOG_MIN_P = 0, 1, 2, 4, 6, 7
"""A float's bits stand for it; the seed, and top_p as a float64, take two words."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one plan runs, as the host sees it. Row i is slot `slots[i]`.

    The same object stands for every later step in which the same rows decode one token: then `starts` lags.
    """

    num_rows: int
    num_sampling: int
    """How many rows sample; all of them in a decode step."""
    decode: bool
    """Every row continues its request by one token and samples."""
    special: bool
    """Some row wants penalties, fixed rules on tokens or logprobs; or some prompt wants logprobs."""
    filtered: bool
    """Some row has top_k, top_p or min_p."""
    ruled: bool
    """Some row has rules that the host applies."""
    slots: I64
    starts: I64
    """Position of each row's first token."""
    num_scheduled: I64
    continuing: Bools
    """The rows that compute one token and were admitted before. A row admitted now may share blocks that
    another row fills in this very step: it must not read before that one has written."""
    sampling: I64
    """The rows that sample, ascending."""
    changed: bool
    """False when slots and requests are those of the work before, in the same order."""
    prompts: Sequence[PromptRow] = ()
    """The rows of which prompt logprobs are wanted."""

    @property
    def needs_host(self) -> bool:
        """The host has a part in the draw: it cannot stand in a CUDA graph."""
        return self.special or self.ruled


class DeviceSlots:
    """The slot table on `device`; after the core's slots comes one of padding, whose block is padding too.

    All tables are parts of one int32 array, so that any number of changes is one upload and one launch:

    - `tokens` [num_slots + 1, max_model_len]: every token of a slot, those sampled on the device included
    - `block_tables` [num_slots + 1, max_blocks]
    - `columns` [num_slots + 1, NUM_COLUMNS]: see the constants above
    - `rows` [num_slots, rounded up]: the slots of the current step, then the padding slot
    - `counter` [1]: the row of the results ring that the next step's tokens go to
    """

    def __init__(
        self,
        device: torch.device,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        num_kv_blocks: int,
        constraints: Constraints | None = None,
    ) -> None:
        self.device = device
        self.block_size, self.num_slots = block_size, num_slots
        self.padding_slot, self.padding_block = num_slots, num_kv_blocks
        max_blocks = _round_up(-(-max_model_len // block_size), 4)
        length, rows = _round_up(max_model_len, 4), _round_up(num_slots, 8)
        sizes = (
            (num_slots + 1) * length,
            (num_slots + 1) * max_blocks,
            (num_slots + 1) * NUM_COLUMNS,
            rows,
            4,
        )
        places = np.cumsum([0, *sizes])
        if places[-1] >= 2**31:
            message = f"max_num_seqs {num_slots} requests of {max_model_len} tokens are over 2**31 tokens"
            most = (2**31 - rows - 4) // (length + max_blocks + NUM_COLUMNS) - 1
            raise ConfigError(message, parameter="max_num_seqs", value=num_slots, limit=f"<= {most}")
        self._tokens_at, self._tables_at, self._columns_at, self._rows_at = places[:4].tolist()
        self._length, self._max_blocks = length, max_blocks
        self._all = torch.zeros(int(places[-1]), dtype=torch.int32, device=device)
        tokens, tables, columns, row_slots, counter = torch.split(self._all, list(sizes))
        self.tokens = tokens.view(-1, length)
        self.block_tables = tables.view(-1, max_blocks)
        self.block_tables[self.padding_slot] = self.padding_block
        self.columns = columns.view(-1, NUM_COLUMNS)
        self.filters[1].fill_(1.0)
        self.rows = row_slots
        self.rows.fill_(self.padding_slot)
        self.counter = counter[:1]
        self._changes = _Changes(device)

        self.num_computed = np.zeros(num_slots, np.int64)
        """Of each slot, not counting the last `_behind` steps of the current rows."""
        self.num_tokens = np.zeros(num_slots, np.int64)
        self._num_blocks = np.zeros(num_slots, np.int64)
        self._in_use = np.zeros(num_slots, np.bool_)
        self._special = np.zeros(num_slots, np.bool_)
        self._filtered = np.zeros(num_slots, np.bool_)
        self._ruled = np.zeros(num_slots, np.bool_)
        self.num_prompt = np.zeros(num_slots, np.int64)
        self.sampling = SamplingColumns.empty(num_slots)
        self.constraints = constraints or Constraints()
        self._behind = 0
        self._room = 0
        """Decode steps for which the current rows have blocks, counted from `_behind` = 0."""
        none = np.zeros(0, np.int64)
        self._work = Work(0, 0, True, False, False, False, none, none, none, none > 0, none, True)

    @property
    def lengths(self) -> Tensor:
        """int32 [num_slots + 1], how many tokens of each slot are computed."""
        return self.columns[:, NUM_COMPUTED]

    @property
    def temperatures(self) -> Tensor:
        """float32 [num_slots + 1]"""
        return self.columns.view(torch.float32)[:, TEMPERATURE]

    @property
    def seeds(self) -> Tensor:
        """int64 [num_slots + 1]"""
        return self.columns.view(torch.int64)[:, SEED // 2]

    @property
    def filters(self) -> tuple[Tensor, Tensor, Tensor]:
        """top_k int32, top_p float64 and the logarithm of min_p float32, all [num_slots + 1]"""
        floats, doubles = self.columns.view(torch.float32), self.columns.view(torch.float64)
        return self.columns[:, TOP_K], doubles[:, TOP_P // 2], floats[:, LOG_MIN_P]

    def history(self, slots: I64, length: int) -> Tensor:
        """int32 [len(slots), length], the first tokens of these slots."""
        return self.tokens[upload(slots, self.device), :length]

    def apply(self, plan: StepPlan) -> Work:
        """Take in what the plan changes, start its upload, and say what it runs."""
        if (
            plan.slots is None
            and plan.num_tokens is None
            and not plan.admitted
            and not plan.released
            and not plan.granted
            and self._work.decode
            and not self._work.needs_host
            and self._behind < self._room
        ):
            self._behind += 1
            return self._work
        self._catch_up()
        if plan.released:
            released = _ints(plan.released)
            assert self._in_use[released].all(), f"step {plan.step} releases a free slot: {released}"
            self._in_use[released] = False
            self.constraints.release(released.tolist())
        for admit in plan.admitted:
            self._admit(admit)
        if plan.granted:
            self._grant(_ints(plan.granted).reshape(-1, 2))
        work = self._compose(plan)
        self._changes.send(self._all)
        return work

    # -- the host's lengths ---------------------------------------------------------------------------

    def _catch_up(self) -> None:
        if self._behind:
            self.num_computed[self._work.slots] += self._behind
            self.num_tokens[self._work.slots] += self._behind
            self._behind = 0

    def _compose(self, plan: StepPlan) -> Work:
        rows = self._work.slots
        if plan.slots is not None:
            rows = _ints(plan.slots).astype(np.int64)
            assert len(np.unique(rows)) == len(rows), f"a slot runs twice: {rows}"
            padded = np.full(len(self.rows), self.padding_slot, np.int32)
            padded[: len(rows)] = rows
            self._changes.add(self._rows_at, padded)
        num_scheduled = np.ones(len(rows), np.int64)
        if plan.num_tokens is not None:
            num_scheduled = _ints(plan.num_tokens).astype(np.int64)
            assert len(num_scheduled) == len(rows), f"{len(num_scheduled)} counts for {len(rows)} rows"
            assert (num_scheduled > 0).all(), f"rows without tokens: {num_scheduled}"
        assert self._in_use[rows].all(), f"step {plan.step} runs a free slot: {rows}"
        starts, num_tokens = self.num_computed[rows], self.num_tokens[rows]
        ends = starts + num_scheduled
        samples = ends == num_tokens
        assert (ends <= num_tokens).all(), f"step {plan.step} runs past the tokens: {ends} of {num_tokens}"
        room = self._num_blocks[rows] * self.block_size - ends
        assert (room >= 0).all(), f"step {plan.step} runs past the blocks by {-room} positions"
        assert (ends[samples] < self._length).all(), f"step {plan.step} has no place for the token it draws"
        continuing = (num_scheduled == 1) & ~np.isin(rows, [admit.slot for admit in plan.admitted])
        changed = plan.slots is not None or bool(plan.admitted) or bool(plan.released)
        self._work = self._run(rows, starts, num_scheduled, continuing, samples, changed)
        # The row's next step writes at `ends`; its sampled token has its place already.
        self._room = int(min(room.min(initial=self._length), self._length - 1 - ends.max(initial=0)))
        return self._work

    def _run(
        self,
        rows: I64,
        starts: I64,
        num_scheduled: I64,
        continuing: Bools,
        samples: Bools,
        changed: bool,
    ) -> Work:
        sampling = np.flatnonzero(samples)
        if not changed and np.array_equal(sampling, self._work.sampling):
            sampling = self._work.sampling  # the same object: what was made for these rows holds on
        prompts = self.sampling.prompts(rows, starts, starts + num_scheduled, self.num_prompt)
        self.num_computed[rows] = starts + num_scheduled
        self.num_tokens[rows[sampling]] += 1
        return Work(
            num_rows=len(rows),
            num_sampling=len(sampling),
            decode=len(sampling) == len(rows) and bool(continuing.all()),
            special=bool(prompts) or bool(self._special[rows[sampling]].any()),
            filtered=bool(self._filtered[rows[sampling]].any()),
            ruled=bool(self._ruled[rows[sampling]].any()),
            slots=rows,
            starts=starts,
            num_scheduled=num_scheduled,
            continuing=continuing,
            sampling=sampling,
            changed=changed,
            prompts=prompts,
        )

    # -- changes --------------------------------------------------------------------------------------

    def _admit(self, admit: Admit) -> None:
        slot, tokens, blocks = admit.slot, _ints(admit.tokens), _ints(admit.blocks)
        assert 0 <= slot < self.num_slots, f"there is no slot {slot}"
        assert not self._in_use[slot], f"slot {slot} is taken"
        assert 0 < admit.num_prompt_tokens <= len(tokens), f"prompt of {admit.num_prompt_tokens} tokens"
        assert 0 <= admit.num_computed < len(tokens), f"{admit.num_computed} of {len(tokens)} tokens computed"
        self._check_blocks(blocks)
        self._check_room(slot, len(tokens), len(blocks))
        self._in_use[slot] = True
        self.num_tokens[slot], self.num_computed[slot] = len(tokens), admit.num_computed
        self._num_blocks[slot], self.num_prompt[slot] = len(blocks), admit.num_prompt_tokens
        self.sampling.set(slot, admit)
        self._special[slot] = _is_special(admit.sampling)
        self._filtered[slot] = _is_filtered(admit.sampling)
        self._ruled[slot] = self.constraints.admit(admit)
        self._changes.add(self._tokens_at + slot * self._length, tokens)
        if len(blocks):
            self._changes.add(self._tables_at + slot * self._max_blocks, blocks)
        self._changes.add(self._columns_at + slot * NUM_COLUMNS, _columns(admit))

    def _grant(self, pairs: I32) -> None:
        self._check_blocks(pairs[:, 1])
        assert self._in_use[pairs[:, 0]].all(), f"blocks granted to a free slot: {pairs[:, 0]}"
        order = np.argsort(pairs[:, 0], kind="stable")
        slots, blocks = pairs[order, 0], pairs[order, 1]
        begins = np.flatnonzero(np.diff(slots, prepend=-1)).tolist()
        for begin, end in zip(begins, [*begins[1:], len(slots)], strict=True):
            slot = int(slots[begin])
            count = int(self._num_blocks[slot])
            self._check_room(slot, 0, count + end - begin)
            self._changes.add(self._tables_at + slot * self._max_blocks + count, blocks[begin:end])
            self._num_blocks[slot] = count + end - begin

    def _check_room(self, slot: int, tokens: int, blocks: int) -> None:
        room = f"slot {slot} has room for {self._length} tokens and {self._max_blocks} blocks"
        assert tokens <= self._length, f"{room}, not {tokens} tokens"
        assert blocks <= self._max_blocks, f"{room}, not {blocks} blocks"

    def _check_blocks(self, blocks: I32) -> None:
        if len(blocks):
            low, high = int(blocks.min()), int(blocks.max())
            assert 0 <= low <= high < self.padding_block, f"blocks {low}..{high} of {self.padding_block}"


class _Changes:
    """Runs of integers that shall stand somewhere in the array, collected until they are sent."""

    def __init__(self, device: torch.device) -> None:
        self._staging = Staging(device)
        self._places: list[int] = []
        self._values: list[I32] = []

    def add(self, place: int, values: I32) -> None:
        """`values` shall stand at `place` of the array."""
        self._places.append(place)
        self._values.append(values)

    def send(self, target: Tensor) -> None:
        """They are in `target` before anything that is launched from now on."""
        if not self._places:
            return
        lengths = np.array([len(values) for values in self._values], np.int32)
        count = len(lengths)
        segments = np.empty((count, 3), np.int32)
        segments[:, 0], segments[:, 2] = self._places, lengths
        segments[:, 1] = 3 * count + np.cumsum(lengths) - lengths
        (staged,) = self._staging.send(np.concatenate((segments.reshape(-1), *self._values)))
        copy_segments(target, staged, count, int(lengths.max()))
        self._places, self._values = [], []


def _columns(admit: Admit) -> I32:
    """A new slot's row of `DeviceSlots.columns`."""
    wanted = admit.sampling
    column = np.zeros(NUM_COLUMNS, np.int32)
    floats = column.view(np.float32)
    column[NUM_COMPUTED] = admit.num_computed
    floats[TEMPERATURE] = wanted.temperature
    column[SEED : SEED + 2] = np.array([wanted.seed], np.uint64).view(np.int32)
    column[TOP_P : TOP_P + 2] = np.array([wanted.top_p], np.float64).view(np.int32)
    column[TOP_K] = max(wanted.top_k, 0)
    floats[LOG_MIN_P] = math.log(wanted.min_p) if wanted.min_p > 0 else -math.inf
    return column


def _is_special(wanted: Sampling) -> bool:
    """The draw needs more than temperature, filters and noise."""
    stops = wanted.eos_token_id is not None or bool(wanted.stop_token_ids)
    held_back = wanted.min_tokens > 0 and stops and wanted.grammar is None  # a grammar does so itself
    penalized = (
        wanted.presence_penalty != 0 or wanted.frequency_penalty != 0 or wanted.repetition_penalty != 1
    )
    ruled = TokenRules.of(wanted) is not None or Wish.of(wanted) is not None
    return held_back or penalized or ruled


def _is_filtered(wanted: Sampling) -> bool:
    return wanted.temperature > 0 and (wanted.top_k > 0 or wanted.top_p < 1 or wanted.min_p > 0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _ints(column: bytes) -> I32:
    return np.frombuffer(column, np.int32)
