"""The slot table takes in plans, and refuses those that contradict it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from headrace.ipc.messages import Admit, Sampling, StepPlan, pack
from headrace.worker.slots import Batch, Slots


def plan(
    slots: list[int] | None = None,
    num_tokens: list[int] | None = None,
    *,
    admitted: list[Admit] | None = None,
    granted: list[int] | None = None,
    released: list[int] | None = None,
) -> StepPlan:
    return StepPlan(
        step=1,
        released=pack(released or []),
        admitted=admitted or [],
        granted=pack(granted or []),
        slots=None if slots is None else pack(slots),
        num_tokens=None if num_tokens is None else pack(num_tokens),
    )


def admit(slot: int, tokens: list[int], blocks: list[int], num_computed: int = 0) -> Admit:
    return Admit(slot, pack(tokens), len(tokens), num_computed, pack(blocks), Sampling(seed=slot))


def step(table: Slots, message: StepPlan, tokens: list[int]) -> Batch:
    batch = table.apply(message)
    table.commit(batch, np.array(tokens, np.int32))
    return batch


@pytest.fixture
def table() -> Slots:
    """Four slots, 32 positions, blocks of 4; slot 2 runs [5, 6, 7, 8, 9]."""
    table = Slots(4, 32, 4, 16)
    step(table, plan([2], [5], admitted=[admit(2, [5, 6, 7, 8, 9], [3, 1])]), [77])
    return table


def test_a_whole_prompt_samples_its_first_token(table: Slots) -> None:
    assert table.num_computed[2] == 5
    assert table.num_tokens[2] == 6
    assert table.tokens[2, :6].tolist() == [5, 6, 7, 8, 9, 77]
    assert table.block_tables[2, :2].tolist() == [3, 1]


def test_an_unchanged_step_reuses_the_rows(table: Slots) -> None:
    first = step(table, plan(), [78])
    second = step(table, plan(), [79])
    assert not first.changed
    assert second.sampling is first.sampling
    assert second.starts.tolist() == [6]
    assert table.tokens[2, :8].tolist() == [5, 6, 7, 8, 9, 77, 78, 79]


def test_a_chunk_samples_only_at_the_end(table: Slots) -> None:
    new = admit(0, list(range(10, 19)), [4, 5, 6], num_computed=4)
    batch = step(table, plan([0, 2], [3, 1], admitted=[new]), [78])
    assert batch.sampling.tolist() == [1]
    assert batch.changed
    assert batch.admitted == {0}
    batch = step(table, plan([2, 0], [1, 2]), [79, 80])
    assert batch.sampling.tolist() == [0, 1]
    assert not batch.one_each
    assert table.tokens[0, 9] == 80
    assert table.tokens[2, 7] == 79


def test_blocks_are_granted_in_order_to_many_slots(table: Slots) -> None:
    step(table, plan([1], [2], admitted=[admit(1, [1, 2], [0])]), [9])
    step(table, plan([1, 2], granted=[2, 10, 1, 11, 2, 12, 1, 13, 2, 14]), [1, 1])
    assert table.block_tables[2, :5].tolist() == [3, 1, 10, 12, 14]
    assert table.block_tables[1, :3].tolist() == [0, 11, 13]
    assert table.num_blocks.tolist() == [0, 3, 5, 0]


def test_a_released_slot_serves_the_next_request(table: Slots) -> None:
    batch = step(table, plan(released=[2], admitted=[admit(2, [1], [5])]), [4])
    assert batch.changed
    assert batch.starts.tolist() == [0]
    assert table.tokens[2, :2].tolist() == [1, 4]


def test_sampling_parameters_become_columns(table: Slots) -> None:
    sampling = Sampling(
        temperature=0.5, top_p=0.9, top_k=3, seed=2**63 - 1, eos_token_id=2, stop_token_ids=[8], min_tokens=4
    )
    table.apply(plan([0], [1], admitted=[Admit(0, pack([1]), 1, 0, pack([0]), sampling)]))
    columns = table.sampling
    assert (columns.temperature[0], columns.top_p[0], columns.top_k[0]) == (0.5, 0.9, 3)
    assert columns.seed[0] == 2**63 - 1
    assert columns.stop_ids[0] == [2, 8]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (plan([2, 2]), "runs twice"),
        (plan([1]), "free slot"),
        (plan([2], [0]), "without tokens"),
        (plan([2], [1, 1]), "2 counts for 1 rows"),
        (plan([2], [2]), "past the tokens"),
        (plan(released=[1]), "free slot"),
        (plan(released=[2]), "free slot"),
        (plan(released=[-2]), "releases a free slot"),  # the second from the end, 2, is in use
        (plan(released=[4]), "releases a free slot"),
        (plan([-2]), "runs a free slot"),
        (plan([4]), "runs a free slot"),
        (plan(granted=[-2, 3]), "granted to a free slot"),
        (plan(granted=[1, 3]), "free slot"),
        (plan(granted=[2, 16]), "16 of 16"),
        (plan([2, 0], [1, 5], admitted=[admit(0, [1] * 5, [0])]), "past the blocks"),
        (plan([2], admitted=[admit(2, [1], [0])]), "taken"),
        (plan([2], admitted=[admit(4, [1], [0])]), "no slot 4"),
        (plan([2], admitted=[admit(0, [], [0])]), "0 tokens"),
        (plan([2], admitted=[admit(0, [1, 2], [0], num_computed=2)]), "2 of 2"),
        (plan([2], admitted=[admit(0, [1, 2], [-1])]), "-1"),
    ],
)
def test_contradictions_are_refused(table: Slots, broken: StepPlan, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        table.apply(broken)


def test_a_request_inherits_no_wish_or_rule_of_the_one_before_it_in_its_slot(table: Slots) -> None:
    rules = {"allowed_token_ids": pack([3]), "logprobs": 2, "prompt_logprobs": 1}
    step(table, plan([2, 0], [1, 2], admitted=[ruled(0, rules)]), [78, 3])
    columns = table.sampling
    assert [0 in kept for kept in (columns.token_rules, columns.wishes, columns.prompt_wishes)] == [True] * 3
    step(table, plan([2, 0], [1, 2], released=[0], admitted=[ruled(0, {})]), [79, 4])
    assert not columns.token_rules
    assert not columns.wishes
    assert not columns.prompt_wishes


def test_a_prompts_logprobs_end_before_its_last_token(table: Slots) -> None:
    """The token that follows the last one is drawn, and not of the prompt."""
    tokens = [5, 6, 7, 8, 9, 5, 6, 7]
    message = Admit(0, pack(tokens), len(tokens), 0, pack([4, 5, 6]), Sampling(prompt_logprobs=0))
    first = step(table, plan([0], [4], admitted=[message]), [])
    assert [(row.slot, row.start, row.length) for row in first.prompts] == [(0, 0, 4)]
    second = step(table, plan([0], [4]), [3])
    assert [(row.slot, row.start, row.length) for row in second.prompts] == [(0, 4, 3)]
    assert not step(table, plan([0], [1]), [3]).prompts


def test_a_grammar_alone_holds_stop_tokens_back(table: Slots) -> None:
    """It knows when nothing else may come."""
    for slot, grammar in ((0, None), (1, "{}")):
        wanted = Sampling(min_tokens=7, grammar=grammar)
        message = Admit(slot, pack([5, 6]), 2, 0, pack([4 + slot]), wanted)
        table.apply(plan([slot], [2], admitted=[message]))
    assert table.sampling.min_tokens[:2].tolist() == [7, 0]


def ruled(slot: int, options: dict[str, Any]) -> Admit:
    return Admit(slot, pack([5, 6]), 2, 0, pack([7]), Sampling(**options))
