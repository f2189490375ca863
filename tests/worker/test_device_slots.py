"""The slot table on the device: what a plan that changes nothing costs, and what follows it."""

from __future__ import annotations

import pytest
import torch
from headrace.ipc.errors import ConfigError
from headrace.ipc.messages import Admit, Sampling, StepPlan, pack
from headrace.worker.constraints import Constraints
from headrace.worker.device_slots import DeviceSlots, Work

BLOCK, PROMPT = 4, 6
SAME = StepPlan(2, b"", [], b"", None, None)


def decoding(rows: int, blocks_each: int) -> tuple[DeviceSlots, Work]:
    """So many requests that have generated one token and compute it now."""
    constraints = Constraints(lambda sampling, prompt: [])
    slots = DeviceSlots(torch.device("cpu"), rows, 64, BLOCK, rows * blocks_each, constraints)
    admitted = [
        Admit(
            slot,
            pack([1] * PROMPT),
            PROMPT,
            0,
            pack(range(slot * blocks_each, (slot + 1) * blocks_each)),
            Sampling(),
        )
        for slot in range(rows)
    ]
    slots.apply(StepPlan(0, b"", admitted, b"", pack(range(rows)), pack([PROMPT] * rows)))
    return slots, slots.apply(StepPlan(1, b"", [], b"", None, pack([1] * rows)))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_plan_that_changes_nothing_is_not_looked_into(rows: int) -> None:
    slots, work = decoding(rows, blocks_each=4)
    lengths = slots.num_computed
    for _ in range(4 * BLOCK - PROMPT - 1):
        assert slots.apply(SAME) is work
        assert (slots.num_computed == lengths).all()  # nothing was counted, for any number of rows
    with pytest.raises(AssertionError, match="past the blocks"):
        slots.apply(SAME)


def test_what_was_not_counted_is_made_up_for() -> None:
    slots, _ = decoding(3, blocks_each=4)
    for _ in range(3):
        slots.apply(SAME)
    work = slots.apply(StepPlan(5, pack([1]), [], b"", pack([2, 0]), pack([1, 1])))
    assert work.starts.tolist() == [PROMPT + 4] * 2
    assert slots.num_tokens[[0, 2]].tolist() == [PROMPT + 6] * 2
    assert slots.apply(SAME) is work
    work = slots.apply(StepPlan(7, b"", [], pack([0, 4]), None, None))
    assert work.starts.tolist() == [PROMPT + 6] * 2


@pytest.mark.parametrize(
    "admit",
    [
        Admit(1, pack([1] * 65), 65, 0, pack(range(16)), Sampling()),
        Admit(1, pack([1] * 6), 6, 0, pack(range(17)), Sampling()),
    ],
)
def test_what_does_not_fit_into_a_slot_is_not_written_into_the_next(admit: Admit) -> None:
    slots, _ = decoding(3, blocks_each=8)
    slots.apply(StepPlan(2, pack([1]), [], b"", pack([0, 2]), None))
    with pytest.raises(AssertionError, match="slot 1 has room for 64 tokens and 16 blocks"):
        slots.apply(StepPlan(3, b"", [admit], b"", None, None))


def test_more_blocks_than_a_table_has_are_not_granted() -> None:
    slots, _ = decoding(3, blocks_each=8)
    with pytest.raises(AssertionError, match="slot 1 has room for 64 tokens and 16 blocks"):
        slots.apply(StepPlan(2, b"", [], pack([1, 0] * 9), None, None))


def test_a_row_that_is_admitted_for_its_last_token_does_not_count_as_decoding() -> None:
    """Its blocks may be filled by another row of the same step."""
    slots, work = decoding(2, blocks_each=8)
    assert work.continuing.tolist() == [True, True]
    admitted = Admit(1, pack([1] * 5), 5, 4, pack([8, 9]), Sampling())
    work = slots.apply(StepPlan(2, pack([1]), [admitted], b"", pack([0, 1]), pack([1, 1])))
    assert (work.continuing.tolist(), work.decode) == ([True, False], False)


def test_a_slot_has_all_bits_of_its_seed() -> None:
    slots, _ = decoding(2, blocks_each=8)
    seed = (1 << 63) + (5 << 32) + 7
    admitted = Admit(1, pack([1]), 1, 0, pack([8]), Sampling(seed=seed, top_p=0.9, temperature=0.7))
    slots.apply(StepPlan(2, pack([1]), [admitted], b"", pack([1]), None))
    assert int(slots.seeds[1]) == seed - (1 << 64)
    assert float(slots.filters[1][1]) == 0.9
    assert float(slots.temperatures[1]) == pytest.approx(0.7)


def test_no_token_is_drawn_for_a_place_behind_the_last() -> None:
    slots, _ = decoding(1, blocks_each=16)
    for _ in range(64 - PROMPT - 2):
        slots.apply(SAME)
    with pytest.raises(AssertionError, match="no place for the token"):
        slots.apply(SAME)


def test_a_table_that_int32_cannot_number_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs 16384 requests of 131072 tokens") as error:
        DeviceSlots(torch.device("cpu"), 16384, 131072, 16, 1000)
    assert error.value.parameter == "max_num_seqs"
    (most,) = (int(part) for part in str(error.value.limit).split() if part.isdecimal())
    assert (
        (most + 1) * (131072 + 8192 + 8) + 16384 + 4 < 2**31 <= (most + 2) * (131072 + 8192 + 8) + 16384 + 4
    )
