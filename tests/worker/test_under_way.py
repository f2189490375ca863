"""Steps under way: a draw that needs the tokens of the step before comes after them, and before all else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from headrace.ipc.errors import ErrorInfo, RequestError
from headrace.ipc.messages import FailedRow
from headrace.worker.device_step import Shown
from headrace.worker.under_way import Drawn, UnderWay


class Event:
    """What a device would do to a CUDA event, done by hand."""

    def __init__(self) -> None:
        self.recorded = self.come = False

    def record(self) -> None:
        self.recorded, self.come = True, False

    def query(self) -> bool:
        return self.recorded and self.come

    def synchronize(self) -> None:
        assert self.recorded, "it would wait for ever"
        self.come = True


class Steps:
    """Two steps, of which the second's draw waits for the first."""

    def __init__(self) -> None:
        self.events: list[Any] = [Event(), Event()]
        self.log: list[str] = []
        row = torch.tensor([5, 6, 7, 8], dtype=torch.int32)
        self.first = UnderWay(1, self.events[0], row, slice(2))
        self.second = UnderWay(2, self.events[1], row, slice(2, 4))
        self.first.launched()

    def draw(self) -> Drawn:
        self.log.append("drawn")
        failed = FailedRow(1, ErrorInfo.of(RequestError("no")))
        return Drawn(Shown((), ()), [failed])


@pytest.fixture
def steps() -> Steps:
    return Steps()


def test_a_draw_waits_for_the_step_before(steps: Steps) -> None:
    steps.second.draw_later(steps.draw, steps.first)
    assert not steps.second.ready()
    assert not steps.log
    steps.events[0].come = True
    assert not steps.second.ready()  # drawn, but not done
    assert steps.log == ["drawn"]
    steps.events[1].come = True
    assert steps.second.ready()
    result = steps.second.result()
    assert (result.step, list(memoryview(result.tokens).cast("i"))) == (2, [7, 8])
    assert [failed.row for failed in result.failed] == [1]
    assert steps.log == ["drawn"]


def test_an_event_that_came_for_an_earlier_step_says_nothing_of_this_one(steps: Steps) -> None:
    steps.events[1].recorded = steps.events[1].come = True
    steps.second.draw_later(steps.draw, steps.first)
    assert not steps.second.ready()
    assert not steps.log


def test_a_draw_that_waits_for_nobody_is_launched_at_once(steps: Steps) -> None:
    steps.second.draw_later(steps.draw, None)
    assert steps.log == ["drawn"]
    assert not steps.second.ready()


def test_a_draw_is_launched_at_once_when_the_step_before_is_done(steps: Steps) -> None:
    steps.events[0].come = True
    steps.second.draw_later(steps.draw, steps.first)
    assert steps.log == ["drawn"]


@pytest.mark.parametrize("how", ["settle", "tokens", "result"])
def test_who_cannot_wait_has_it_drawn(steps: Steps, how: str) -> None:
    steps.second.draw_later(steps.draw, steps.first)
    getattr(steps.second, how)()
    assert steps.log == ["drawn"]
    assert steps.events[1].recorded
