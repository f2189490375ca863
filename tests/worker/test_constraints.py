"""Rules on the next token: fed every generated token whatever happens, applied to their rows alone, and a
rule that fails ends one request.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import RequestError
from headrace.ipc.messages import Admit, Sampling, StepPlan, ThinkingBudget, pack
from headrace.worker.constraints import Constraint, ConstraintBuilder, Constraints, Mask, Tokens
from headrace.worker.sampler import Sampler
from headrace.worker.slots import Slots

VOCAB = 70


class Cycle:
    """After token t only t + 1 may come, beginning after the prompt's last; 60 is beyond it."""

    def __init__(self, last: int) -> None:
        self.last = last

    def accept(self, token: int) -> None:
        if token != self.last + 1:
            raise AssertionError(f"{token} after {self.last}")
        self.last = token

    def fill(self, mask: Mask) -> bool:
        if self.last >= 60:
            raise RequestError("nothing may follow", parameter="structured_outputs")
        mask[:] = 0
        following = self.last + 1
        mask[following // 32] = np.array(1 << following % 32, np.uint32).view(np.int32)
        return True


def build(sampling: Sampling, prompt: Tokens) -> list[Constraint]:
    """A cycle for requests with seed 1; those with seed 2 cannot be built."""
    if sampling.seed == 2:
        raise RequestError("no such grammar", parameter="structured_outputs", value="x")
    return [Cycle(int(prompt[-1]))] if sampling.seed == 1 else []


@pytest.fixture
def table() -> Slots:
    return Slots(4, 32, 4, 64, Constraints(build))


def admit(slot: int, prompt: list[int], seed: int, generated: tuple[int, ...] = ()) -> Admit:
    tokens, blocks = [*prompt, *generated], pack(range(slot * 8, slot * 8 + 8))
    return Admit(slot, pack(tokens), len(prompt), 0, blocks, Sampling(temperature=0.0, seed=seed))


def step(table: Slots, *admitted: Admit, released: bytes = b"", rows: tuple[int, ...] = ()) -> list[int]:
    """Run a plan; every row would choose token 5 if it could."""
    slots = [*rows, *(new.slot for new in admitted)]
    counts = [1] * len(rows) + [len(new.tokens) // 4 for new in admitted]
    batch = table.apply(StepPlan(0, released, list(admitted), b"", pack(slots), pack(counts)))
    logits = torch.zeros(len(slots), VOCAB)
    logits[:, 5] = 1
    tokens = Sampler(torch.device("cpu")).sample(logits, table, batch).tokens.numpy().astype(np.int32)
    table.commit(batch, tokens)
    return [int(token) for token in tokens]


def test_a_rule_is_fed_each_token_and_binds_its_own_row(table: Slots) -> None:
    assert step(table, admit(0, [9, 30], 1), admit(1, [3], 0)) == [31, 5]
    assert step(table, rows=(1, 0)) == [5, 32]
    assert step(table, admit(2, [65, 40], 1), rows=(0, 1)) == [33, 5, 41]


def test_a_preempted_request_finds_its_rule_where_it_was(table: Slots) -> None:
    assert step(table, admit(0, [30], 1)) == [31]
    assert step(table, rows=(0,)) == [32]
    assert step(table, admit(1, [30], 1, (31, 32)), released=pack([0])) == [33]


def test_a_reused_slot_is_told_nothing_of_the_request_before(table: Slots) -> None:
    step(table, admit(0, [30], 1))
    assert step(table, admit(0, [10], 1), released=pack([0])) == [11]
    assert step(table, rows=(0,)) == [12]


@pytest.mark.parametrize(
    ("new", "says"),
    [
        (admit(0, [7], 2), "no such grammar"),
        (admit(0, [7], 1, (9,)), "9 after 7"),
        (admit(0, [59], 1, (60,)), "nothing may follow"),
    ],
)
def test_a_rule_that_fails_ends_its_request_alone(table: Slots, new: Admit, says: str) -> None:
    tokens = step(table, admit(1, [30], 1), new)
    assert tokens == [31, 5]  # it goes on without rules until the core has heard of it
    (failed,) = table.constraints.failed(np.array([1, 0]))
    assert failed.row == 1
    assert failed.error.kind == "request"
    assert says in failed.error.message
    assert step(table, admit(0, [20], 1), released=pack([0]), rows=(1,)) == [32, 21]
    assert table.constraints.failed(np.array([1, 0])) == []


def test_rules_that_leave_no_token_end_the_request(make_config: Callable[..., EngineConfig]) -> None:
    """Thinking must end, and its end is not among the allowed tokens."""
    constraints = Constraints(ConstraintBuilder(make_config(vocab_size=VOCAB)))
    thinking = ThinkingBudget(budget=0, begin=3, end=4)
    for slot, allowed in enumerate(([4, 5], [5])):
        sampling = Sampling(thinking=thinking, allowed_token_ids=pack(allowed))
        assert constraints.admit(Admit(slot, pack([3]), 1, 0, b"", sampling))
    masks = constraints.masks(np.arange(2), VOCAB)
    assert masks is not None
    assert masks.mask_of_row.tolist() == [0, -1]
    (failed,) = constraints.failed(np.arange(2))
    assert (failed.row, failed.error.kind) == (1, "request")
    assert "other parameters forbid" in failed.error.message
    assert failed.error.parameter == "allowed_token_ids"


def test_masks_are_written_into_the_same_memory_every_step(table: Slots) -> None:
    step(table, admit(0, [1, 2], seed=1), admit(1, [7], seed=1))
    first = table.constraints.masks(np.arange(2), VOCAB)
    again = table.constraints.masks(np.arange(2), VOCAB)
    assert first is not None
    assert again is not None
    assert np.shares_memory(first.allowed, again.allowed)
