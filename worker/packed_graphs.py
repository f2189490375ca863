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
from .device_step import DeviceStep, PackedTensors, prompt_tiles
from .graphs import Recorder, Recording
from .slots import I64
from .staging import aligned

_DECODES = (0, 8, 32, 64, 128, 256)
_TOKENS = (32, 128, 512)
_FEWER_DECODES = (0, 128)
_MORE_TOKENS = (768, 1024, 1536, 2048, 3072, 4096)
MAX_TOKENS = _TOKENS[-1]
"""Of prompts, whatever the model. With more the GPU is slower than the host, unless the model is small."""


def tokens_while_launching(layer_weights: int) -> int:
    """Tokens that an H200 computes (0.35e15 weights times tokens a second) while the host launches the
    kernels of a layer of so many weights (0.3 ms)."""
    return int(105e9) // layer_weights


class Shape(NamedTuple):
    """What a recording has room for."""

    decodes: int
    tokens: int
    """Of all prompts and chunks together."""

    @property
    def prompts(self) -> int:
        """Rows that are not decodes."""
        return max(self.tokens // 16, 16)


def shapes(most_decodes: int, most_tokens: int) -> list[Shape]:
    """What to record for steps of at most so many decodes and prompt tokens, the most useful first."""

    def crossed(decodes: tuple[int, ...], tokens: tuple[int, ...]) -> list[Shape]:
        fewer = [*(count for count in decodes if count < most_decodes), most_decodes]
        return [Shape(rows, length) for rows in fewer for length in tokens if length <= most_tokens]

    return crossed(_DECODES, _TOKENS) + crossed(_FEWER_DECODES, _MORE_TOKENS)


class Form:
    """The buffer of one shape, and how a step is laid out in it."""

    def __init__(self, step: DeviceStep, shape: Shape) -> None:
        self.shape = shape
        self._padding_slot, self._tile_tokens = step.slots.padding_slot, step.tile_tokens
        self._num_tiles = shape.tokens // step.tile_tokens + shape.prompts
        rows, sampling = shape.decodes + shape.prompts + 1, shape.decodes + shape.prompts
        sizes = [rows, rows, rows + 1, 2 * self._num_tiles, sampling, sampling, sampling]
        places = [aligned(size) for size in sizes]
        self.buffer = torch.zeros(sum(places), dtype=torch.int32, device=step.slots.device)
        parts = zip(torch.split(self.buffer, places), sizes, strict=True)
        self.tensors = PackedTensors(*(part[:size] for part, size in parts))

    def fill(self, work: Work | None) -> tuple[PackedArrays, I64]:
        """The step `work`, or one of padding alone; and where in the results its sampling rows are."""
        decodes, tokens = self.shape
        rows = decodes + self.shape.prompts + 1
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
        tiles = np.full((self._num_tiles, 2), -1)
        found = prompt_tiles(np.arange(decodes, rows - 1), query_lens, starts, self._tile_tokens)
        tiles[: len(found)] = found
        return PackedArrays(slots, starts, query_start, tiles, last, sampling_slots, ends), place


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

    def __init__(self, recorder: Recorder, step: DeviceStep, most_tokens: int) -> None:
        """`most_tokens`: of prompts, in a recording."""
        self._recorder, self._step = recorder, step
        self._recorded: dict[Shape, tuple[Form, Recording[None]]] = {}
        self._in_use: set[Shape] = set()
        table = step.slots
        room = min(table.tokens.shape[1], table.block_tables.shape[1] * table.block_size)
        self._shapes = shapes(len(table.rows), min(room, most_tokens))

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
        if work.needs_host or (work.filtered and not self._step.has_all_logits):
            return None
        prompts = work.num_rows - num_decodes
        fitting = (
            shape
            for shape in self._in_use
            if shape.decodes >= num_decodes and shape.tokens >= tokens and shape.prompts >= prompts
        )
        shape = min(fitting, default=None, key=lambda s: (sum(s), s))
        most = (4 if tokens <= MAX_TOKENS else 2) * (num_decodes + tokens) + 64
        if shape is None or sum(shape) > most:
            return None
        form, recording = self._recorded[shape]
        arrays, places = form.fill(work)
        self._step.staging.send_to(form.buffer, *arrays)
        recording.replay()
        return places

    def _launch(self, form: Form, rehearsal: bool = False) -> None:
        decodes, tokens = form.shape
        logits = self._step.run_packed(form.tensors, decodes + tokens, tokens, decodes)
        assert logits is not None
        # Rows without a filter cost next to nothing.
        self._step.draw(logits, rehearsal, filtered=self._step.has_all_logits)
