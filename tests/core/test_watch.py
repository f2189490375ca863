"""What hangs, and what only takes long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from headrace.core.watch import BUSY_SECONDS, COMPILE_SECONDS, Compilation, Sight, Watch
from headrace.ipc.inspection import Activity

IDLE = Compilation("", 0.0)


def run(
    watch: Watch,
    states: str,
    seconds: int,
    *,
    cpu: float = 0.0,
    is_due: bool = True,
    compilations: Mapping[int, Compilation] | None = None,
    distances: Sequence[int] = (7, 7),
) -> None:
    """Look once a second at ranks in these states that use `cpu` of a CPU."""
    start = int(watch._last_look)
    for now in range(start + 1, start + seconds + 1):
        ranks = {
            rank: Sight(Activity(state, now * cpu), (compilations or {}).get(rank, IDLE), distances[rank])
            for rank, state in enumerate(states)
        }
        watch.look(now, ranks, is_due=is_due)


def make(*, cpu: bool = True) -> Watch:
    watch = Watch(8.0, computes_on_cpu=cpu)
    watch.look(0.0, {0: Sight(Activity("S", 0.0), IDLE, 7)}, is_due=True)
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
    for _ in range(9):  # it was stopped since the first answer
        watch.answered()
        run(watch, "ST", 1)
    assert watch.has_hung
    watch.answered()
    run(watch, "SS", 1)
    assert watch.verdict is None


@pytest.mark.parametrize("states", ["S", "T"])
@pytest.mark.parametrize("idle_before", [0, 5])
def test_the_time_before_the_plan_does_not_count(states: str, idle_before: int) -> None:
    """It went out, or the worker was stopped, at some moment since the last look, if there was one."""
    watch = Watch(8.0, computes_on_cpu=False)
    run(watch, "S", idle_before, is_due=False)
    watch._last_look = idle_before or 5000.0
    run(watch, states, 3)  # the last is at most three seconds after that moment
    assert watch.verdict is None
    run(watch, states, 1)
    assert watch.verdict is not None
    assert watch.verdict.seconds == 3.0


def test_a_worker_that_has_just_answered_was_not_stopped_before() -> None:
    watch = make()
    watch.answered()
    run(watch, "T", 3)
    assert watch.verdict is None


def test_idle_ranks_and_a_core_that_was_stopped_itself() -> None:
    watch = make()
    run(watch, "SS", 1000, is_due=False)
    assert watch.verdict is None
    run(watch, "S", 1)
    watch.look(5000.0, {0: Sight(Activity("S", 0.0), IDLE, 7)}, is_due=True)
    assert not watch.has_hung


def test_a_kernel_that_is_compiled_has_time_and_its_rank_is_blamed() -> None:
    watch = make(cpu=False)
    one = {0: Compilation("", 0.0), 1: Compilation("attend", 1.0)}
    run(watch, "RS", int(COMPILE_SECONDS) + 3, cpu=1.0, compilations=one)
    assert watch.verdict is None
    run(watch, "RS", 6, cpu=1.0, compilations=one)
    assert watch.has_hung
    assert watch.verdict is not None
    assert watch.verdict.rank == 1
    assert watch.verdict.text.startswith("worker 1 is compiling attend for 128 s (worker 0: running")
    run(watch, "RT", 1, cpu=1.0, compilations=one)
    assert watch.verdict is not None
    assert watch.verdict.text.startswith("no progress")


def test_kernel_after_kernel_is_progress_and_its_end_is_not() -> None:
    watch = make(cpu=False)
    for number in range(100):
        run(watch, "RR", 2, compilations={1: Compilation("", float(number))})
    assert watch.verdict is None
    run(watch, "RR", 6, compilations={1: Compilation("", 99.0)})
    assert watch.verdict is not None
    run(watch, "RR", 1, compilations={1: Compilation("", 99.0)})
    assert watch.has_hung


@pytest.mark.parametrize(
    ("states", "distances", "rank"),
    [("R", [3], 0), ("RR", [9, 8], 1), ("SS", [8, 9], 0), ("RRR", [9, 9, 9], None)],
)
def test_the_rank_that_is_behind_is_blamed(states: str, distances: list[int], rank: int | None) -> None:
    watch = make(cpu=False)
    run(watch, states, 8, distances=distances)
    assert watch.has_hung
    assert watch.verdict is not None
    assert watch.verdict.rank == rank
    assert ("because of worker" in watch.verdict.text) == (rank is not None and len(states) > 1)


def test_a_compilation_without_an_end_accuses_nobody_later() -> None:
    watch = make(cpu=False)
    given_up = {0: Compilation("attend", 1.0)}
    run(watch, "R", 1000, is_due=False, compilations=given_up)
    run(watch, "R", 2, compilations=given_up)
    assert watch.verdict is None


def test_there_is_an_end_to_kernels() -> None:
    watch = make(cpu=False)
    for number in range(int(BUSY_SECONDS) + 8):
        run(watch, "R", 1, compilations={0: Compilation("attend", float(number))})
    assert watch.has_hung
