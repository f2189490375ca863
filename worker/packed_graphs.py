"""CUDA graphs of packed steps: short prompts and chunks beside decodes, padded to one of a few shapes.

Launched one kernel at a time such a step takes the host longer than the GPU (4 ms for 16 layers). Recorded,
it reads its composition from one buffer on the device. Padding rows belong to the padding slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from .device_slots import Work
from .device_step import DeviceStep, PackedTensors
from .graphs import Recorder, Recording
from .slots import I64
from .staging import aligned

MAX_PROMPTS = 16
"""Rows that are not decodes."""
_DECODES = (0, 8, 32, 64, 128, 256)
_TOKENS = (32, 128, 512)
MAX_TOKENS = _TOKENS[-1]
"""Of prompts. With more the GPU is the slower one, even with small models."""


class Shape(NamedTuple):
    """What a recording has room for."""

    decodes: int
    tokens: int
    """Of all prompts and chunks together."""


class Form:
    """The buffer of one shape, and how a step is laid out in it."""

    def __init__(self, step: DeviceStep, shape: Shape) -> None:
        self.shape = shape
        self._padding_slot, self._tile_tokens = step.slots.padding_slot, step.tile_tokens
        self._num_tiles = shape.tokens // step.tile_tokens + MAX_PROMPTS
        rows, sampling = shape.decodes + MAX_PROMPTS + 1, shape.decodes + MAX_PROMPTS
        sizes = [rows, rows, rows + 1, 2 * self._num_tiles, sampling, sampling, sampling]
        places = [aligned(size) for size in sizes]
        self.buffer = torch.zeros(sum(places), dtype=torch.int32, device=step.slots.device)
        parts = zip(torch.split(self.buffer, places), sizes, strict=True)
        self.tensors = PackedTensors(*(part[:size] for part, size in parts))

    def fill(self, work: Work | None) -> tuple[PackedArrays, I64]:
        """The step `work`, or one of padding alone; and where in the results its sampling rows are."""
        decodes, tokens = self.shape
        rows = decodes + MAX_PROMPTS + 1
        slots, starts = np.full(rows, self._padding_slot), np.zeros(rows, np.int64)
        query_lens = np.zeros(rows, np.int64)
        query_lens[:decodes] = 1
        last, ends = np.zeros(rows - 1, np.int64), np.ones(rows - 1, np.int64)
        sampling_slots = np.full(rows - 1, self._padding_slot)
        place = np.zeros(0, np.int64)
        if work is not None:
            continuing, others = np.flatnonzero(work.continuing), np.flatnonzero(~work.continuing)
            place = np.empty(work.num_rows, np.int64)
            place[continuing] = np.arange(len(continuing))
            place[others] = decodes + np.arange(len(others))
            slots[place], starts[place], query_lens[place] = work.slots, work.starts, work.num_scheduled
        query_lens[-1] = tokens - query_lens[decodes:].sum()
        query_start = np.concatenate(([0], np.cumsum(query_lens)))
        if work is not None:
            place = place[work.sampling]
            last[place] = query_start[place + 1] - 1
            sampling_slots[place] = work.slots[work.sampling]
            ends[place] = (work.starts + work.num_scheduled)[work.sampling]
        tiles = self._tiles(query_lens)
        return PackedArrays(slots, starts, query_start, tiles, last, sampling_slots, ends), place

    def _tiles(self, query_lens: I64) -> I64:
        first = self.shape.decodes
        counts = -(-query_lens[first:-1] // self._tile_tokens)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        tiles = np.full((self._num_tiles, 2), -1)
        tiles[: len(number), 0] = np.repeat(first + np.arange(len(counts)), counts)
        tiles[: len(number), 1] = number * self._tile_tokens
        return tiles


class PackedArrays(NamedTuple):
    """`PackedTensors` on the host."""

    slots: I64
    starts: I64
    query_start: I64
    tiles: I64
    last: I64
    sampling_slots: I64
    sampling_ends: I64


class PackedGraphs:
    """The recordings."""

    def __init__(self, recorder: Recorder, step: DeviceStep) -> None:
        self._recorder, self._step = recorder, step
        self._recorded: dict[Shape, tuple[Form, Recording[None]]] = {}
        self._in_use: set[Shape] = set()
        table = step.slots
        room = min(table.tokens.shape[1], table.block_tables.shape[1] * table.block_size)
        most = len(table.rows)
        decodes = [*(count for count in _DECODES if count < most), most]
        self._shapes = [Shape(rows, tokens) for rows in decodes for tokens in _TOKENS if tokens <= room]

    def record_next(self) -> Iterator[Shape]:
        """Record all shapes, one with each call for the next."""
        for shape in self._shapes:
            form = Form(self._step, shape)
            self._step.staging.send_to(form.buffer, *form.fill(None)[0])
            launch = partial(self._launch, form)
            self._recorded[shape] = form, self._recorder.record(launch, partial(launch, rehearsal=True))
            yield shape

    def use(self, shape: Shape) -> None:
        """`run` may from now on take this recording: see `Graphs`."""
        self._in_use.add(shape)

    def run(self, work: Work) -> I64 | None:
        """Launch the step; the places of its tokens in the results. None, and nothing happens, if it fits no
        recording.
        """
        num_decodes = int(work.continuing.sum())
        tokens = int(work.num_scheduled.sum()) - num_decodes
        if work.filtered and not self._step.has_all_logits:
            return None
        if work.needs_host or work.num_rows - num_decodes > MAX_PROMPTS:
            return None
        fitting = (s for s in self._in_use if s.decodes >= num_decodes and s.tokens >= tokens)
        shape = min(fitting, default=None, key=lambda s: (sum(s), s))
        if shape is None or sum(shape) > 4 * (num_decodes + tokens) + 64:
            return None
        form, recording = self._recorded[shape]
        arrays, places = form.fill(work)
        self._step.staging.send_to(form.buffer, *arrays)
        recording.replay()
        return places

    def _launch(self, form: Form, rehearsal: bool = False) -> None:
        decodes, tokens = form.shape
        logits = self._step.run_packed(form.tensors, decodes + tokens, tokens, decodes, ())
        assert logits is not None
        # Rows without a filter cost next to nothing.
        self._step.draw(logits, rehearsal, filtered=self._step.has_all_logits)
