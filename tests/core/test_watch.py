"""What hangs, and what only takes long."""

from __future__ import annotations

import pytest
from headrace.core.watch import BUSY_SECONDS, Watch
from headrace.ipc.inspection import Activity


def run(watch: Watch, states: str, seconds: int, *, cpu: float = 0.0, is_due: bool = True) -> None:
    """Look once a second at ranks in these states that use `cpu` of a CPU."""
    start = int(watch._last_look)
    for now in range(start + 1, start + seconds + 1):
        ranks = {rank: Activity(state, now * cpu) for rank, state in enumerate(states)}
        watch.look(now, ranks, is_due=is_due)


def make(*, cpu: bool = True) -> Watch:
    watch = Watch(8.0, computes_on_cpu=cpu)
    watch.look(0.0, {0: Activity("S", 0.0)}, is_due=False)
    return watch


@pytest.mark.parametrize(
    ("states", "cpu", "on_cpu"), [("S", 0.01, True), ("SS", 0.0, True), ("R", 1.0, False)]
)
def test_no_answer_and_no_sign_of_life(states: str, cpu: float, on_cpu: bool) -> None:
    watch = make(cpu=on_cpu)
    run(watch, states, 2, cpu=cpu)
    assert watch.verdict is None
    run(watch, states, 5, cpu=cpu)
    assert watch.verdict is not None
    assert not watch.has_hung
    run(watch, states, 1, cpu=cpu)
    assert watch.has_hung
    watch.answered()
    run(watch, states, 1, cpu=cpu)
    assert watch.verdict is None


@pytest.mark.parametrize(("states", "cpu"), [("S", 1.9), ("SS", 0.2), ("R", 0.0), ("SD", 0.0)])
def test_a_cpu_that_computes_has_time(states: str, cpu: float) -> None:
    watch = make()
    run(watch, states, int(BUSY_SECONDS), cpu=cpu)
    assert watch.verdict is None
    run(watch, states, 8, cpu=cpu)
    assert watch.has_hung


@pytest.mark.parametrize("is_due", [True, False])
def test_a_stopped_rank_is_blamed_whatever_the_others_do(is_due: bool) -> None:
    watch = make()
    run(watch, "RT", 8, cpu=1.0, is_due=is_due)
    assert watch.has_hung
    assert watch.verdict is not None
    assert watch.verdict.rank == 1
    assert "worker 1: stopped" in watch.verdict.text


def test_a_stopped_rank_is_noticed_while_the_others_answer() -> None:
    watch = make()
    for _ in range(8):
        watch.answered()
        run(watch, "ST", 1)
    assert watch.has_hung
    watch.answered()
    run(watch, "SS", 1)
    assert watch.verdict is None


def test_idle_ranks_and_a_core_that_was_stopped_itself() -> None:
    watch = make()
    run(watch, "SS", 1000, is_due=False)
    assert watch.verdict is None
    run(watch, "S", 1)
    watch.look(5000.0, {0: Activity("S", 0.0)}, is_due=True)
    assert not watch.has_hung
