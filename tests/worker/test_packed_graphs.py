"""The layout of a packed step in a graph's buffer: what it holds of the step, and of padding."""

from __future__ import annotations

import random
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from headrace.ipc.messages import Admit, Sampling, StepPlan, pack
from headrace.kernels.slot_table import packed_inputs_reference
from headrace.worker.device_slots import DeviceSlots, Work
from headrace.worker.device_step import DeviceStep
from headrace.worker.models import build_model
from headrace.worker.packed_graphs import Form, PackedGraphs, Shape, shapes
from headrace.worker.parallel import TensorParallel

CPU = torch.device("cpu")
BLOCK, BLOCKS, SLOTS, MAX_LEN = 4, 200, 12, 64
MODEL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


@pytest.fixture
def step() -> DeviceStep:
    model = build_model("LlamaForCausalLM", MODEL, torch.float32, CPU, TensorParallel(), MAX_LEN)
    slots = DeviceSlots(CPU, SLOTS, MAX_LEN, BLOCK, BLOCKS)
    shape = (BLOCKS + 1, BLOCK, model.num_kv_heads, model.head_dim)
    return DeviceStep(model, [(torch.zeros(shape), torch.zeros(shape))], slots, 2)


def admit(slot: int, tokens: list[int], num_computed: int = 0) -> Admit:
    blocks = pack(range(slot * 16, slot * 16 + 16))
    return Admit(slot, pack(tokens), len(tokens), num_computed, blocks, Sampling())


def mixed_work(step: DeviceStep) -> Work:
    """Three decodes among two whole prompts, a chunk with context and a chunk that leaves a rest."""
    rng = random.Random(0)
    prompts = {slot: [rng.randrange(97) for _ in range(9 + slot)] for slot in (3, 7, 1, 4, 0, 9, 2)}
    old = {slot: prompts[slot] for slot in (3, 7, 1)}
    first = [admit(slot, tokens) for slot, tokens in old.items()]
    step.slots.apply(StepPlan(0, b"", first, b"", pack(old), pack(map(len, old.values()))))
    new = [admit(slot, prompts[slot], 8 if slot == 9 else 0) for slot in (4, 0, 9, 2)]
    counts = {3: 1, 4: 13, 7: 1, 0: 9, 1: 1, 9: 10, 2: 5}
    return step.slots.apply(StepPlan(1, b"", new, b"", pack(counts), pack(counts.values())))


def test_rows_keep_their_tokens_and_padding_fills_the_shape(step: DeviceStep) -> None:
    work, table = mixed_work(step), step.slots
    form = Form(step, Shape(8, 64))
    arrays, places = form.fill(work)
    step.staging.send_to(form.buffer, *arrays)
    tensors = form.tensors
    inputs = packed_inputs_reference(
        tensors.slots,
        tensors.query_start,
        tensors.starts,
        table.lengths,
        table.tokens,
        table.block_tables,
        BLOCK,
        8 + 64,
        64,
    )
    assert tensors.query_start[-1] == 8 + 64
    assert tensors.query_start[:9].tolist() == list(range(9))
    assert len(tensors.slots) == 8 + form.shape.prompts + 1
    for slot, start, count in zip(work.slots, work.starts, work.num_scheduled, strict=True):
        (row,) = (tensors.slots == int(slot)).nonzero()[:, 0].tolist()
        first, end = tensors.query_start[row : row + 2].tolist()
        assert end - first == count
        assert inputs.positions[first:end].tolist() == list(range(start, start + count))
        assert torch.equal(inputs.input_ids[first:end], table.tokens[slot, start : start + count].long())
        assert table.lengths[slot] == start + count
    padding = tensors.slots == table.padding_slot
    assert (table.block_tables[table.padding_slot] == table.padding_block).all()
    assert int(padding.sum()) == 8 + form.shape.prompts + 1 - work.num_rows
    assert table.lengths[table.padding_slot] == 0

    assert tensors.sampling_slots[places].tolist() == work.slots[work.sampling].tolist()
    assert (
        tensors.sampling_ends[places].tolist() == (work.starts + work.num_scheduled)[work.sampling].tolist()
    )
    last = inputs.positions[tensors.last[places].long()] + 1
    assert last.tolist() == tensors.sampling_ends[places].tolist()
    others = torch.ones(len(tensors.sampling_slots), dtype=torch.bool)
    others[places] = False
    assert (tensors.sampling_slots[others] == table.padding_slot).all()


class Tape:
    """Recordings that only note which shape is replayed."""

    def __init__(self) -> None:
        self.replayed: list[Shape] = []

    def record(self, run: partial[None], rehearse: partial[None]) -> Tape.Recording:
        return Tape.Recording(self.replayed, run.args[0].shape)

    class Recording(NamedTuple):
        replayed: list[Shape]
        shape: Shape

        def replay(self) -> None:
            self.replayed.append(self.shape)


@pytest.mark.parametrize(
    ("prompts", "length", "chosen"),
    [(16, 2, [(0, 32)]), (17, 1, []), (20, 6, [(0, 512)]), (3, 100, [(0, 512)]), (3, 40, [(0, 128)])],
)
def test_a_step_is_padded_to_the_smallest_shape_with_room(
    prompts: int, length: int, chosen: list[tuple[int, int]]
) -> None:
    """For its tokens and its prompts; to none that is much larger."""
    model = build_model("LlamaForCausalLM", MODEL, torch.float32, CPU, TensorParallel(), 128)
    slots = DeviceSlots(CPU, 24, 512, 16, 24 * 32)
    shape = (1, 16, model.num_kv_heads, model.head_dim)
    step = DeviceStep(model, [(torch.zeros(shape), torch.zeros(shape))], slots, 2)
    tape: Any = Tape()
    graphs = PackedGraphs(tape, step, 512)
    for recorded in graphs.record_next():
        graphs.use(recorded)
    admitted = [
        Admit(i, pack([1] * length), length, 0, pack(range(i * 32, i * 32 + 32)), Sampling())
        for i in range(prompts)
    ]
    plan = StepPlan(0, b"", admitted, b"", pack(range(prompts)), pack([length] * prompts))
    places = graphs.run(slots.apply(plan))
    assert tape.replayed == chosen
    assert (None if places is None else places.tolist()) == (list(range(prompts)) if chosen else None)


def test_tiles_cover_each_prompt_token_once(step: DeviceStep) -> None:
    work = mixed_work(step)
    form = Form(step, Shape(8, 64))
    arrays, _ = form.fill(work)
    tiles = [tuple(tile) for tile in arrays.tiles.tolist() if tile[0] >= 0]
    query_lens = arrays.query_start[1:] - arrays.query_start[:-1]
    expected = {
        (row, first)
        for row in range(8, 8 + form.shape.prompts)
        for first in range(0, int(query_lens[row]), step.tile_tokens)
    }
    assert len(tiles) == len(set(tiles))
    assert set(tiles) == expected
    assert arrays.tiles[: len(tiles), 0].min() >= 0, "tiles come before what is none"
    seen = [arrays.starts[row] + first for row, first in tiles]
    assert seen == sorted(seen, reverse=True), "long tiles come first"


def test_the_results_have_room_for_the_rows_of_every_shape(step: DeviceStep) -> None:
    for shape in shapes(len(step.slots.rows), 100_000):
        reported = len(Form(step, shape).tensors.sampling_slots)
        assert reported <= step.results.shape[1], shape  # the kernel would write behind the ring


@pytest.mark.parametrize("most_tokens", [300, 512, 2243, 100_000])
def test_every_step_has_a_shape_that_is_not_much_larger(most_tokens: int) -> None:
    found = shapes(200, most_tokens)
    assert len(found) == len(set(found))
    assert max(shape.decodes for shape in found) == 200
    largest = max(shape.tokens for shape in found)
    assert largest == max(t for t in (128, 512, 2048, 4096) if t <= most_tokens)
    for decodes, tokens in ((0, 40), (5, 300), (150, 600), (0, 2700), (120, 4096)):
        if tokens <= largest:
            sizes = [s.decodes + s.tokens for s in found if s.decodes >= decodes and s.tokens >= tokens]
            assert min(sizes) <= (4 if tokens <= 512 else 2) * (decodes + tokens) + 64
