"""What ranks agree on. Their lives and deaths are in tests/integration."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from headrace.core.ranks import Ranks, WorkerError
from headrace.ipc.errors import ErrorInfo
from headrace.ipc.messages import Fatal, FromWorker, Prepared, StepPlan, ToWorker, UsePrepared
from headrace.ipc.pipe import Pipe, socket_pair


class Meeting(Ranks):
    """Two ranks that serve; `ends` are theirs."""

    def __init__(self) -> None:
        self.ends: list[Pipe[FromWorker, ToWorker]] = []
        self._pipes, self._prepared = [], [0, 0]
        self._encoder = msgspec.msgpack.Encoder()
        for _ in range(2):
            ours, theirs = socket_pair()
            self._pipes.append(Pipe(ours, FromWorker))
            self.ends.append(Pipe(theirs, ToWorker))

    def heard(self) -> list[list[int]]:
        """What each rank has been told since: the numbers of plans, and counts to use, negative."""
        told: list[list[int]] = []
        for end in self.ends:
            told.append([])
            while (message := end.recv(0)) is not None:
                assert isinstance(message, StepPlan | UsePrepared)
                told[-1].append(message.step if isinstance(message, StepPlan) else -message.count)
        return told


@pytest.fixture
def ranks() -> Iterator[Meeting]:
    meeting = Meeting()
    yield meeting
    for ours, theirs in zip(meeting._pipes, meeting.ends, strict=True):
        ours.close()
        theirs.close()


def plan(step: int) -> StepPlan:
    return StepPlan(step, b"", [], b"", None, None)


def test_what_all_have_prepared_all_use_from_between_the_same_two_plans(ranks: Meeting) -> None:
    ranks.send(plan(1))
    for count in (1, 2, 3):
        ranks.ends[0].send(Prepared(0, count))
    assert ranks.recv() is None
    assert ranks.heard() == [[1], [1]]  # the other rank has not
    ranks.ends[1].send(Prepared(1, 1))
    assert ranks.recv() is None
    ranks.send(plan(2))
    ranks.ends[1].send(Prepared(1, 2))
    assert ranks.recv() is None
    ranks.send(plan(3))
    assert ranks.heard() == [[-1, 2, -2, 3]] * 2


def test_what_is_gone_is_not_used(ranks: Meeting) -> None:
    for rank in range(2):
        ranks.ends[rank].send(Prepared(rank, 5))
        ranks.recv()
    assert ranks.heard() == [[-5], [-5]]
    for rank, count in ((0, 0), (1, 0), (0, 1)):
        ranks.ends[rank].send(Prepared(rank, count))
        ranks.recv()
    assert ranks.heard() == [[], []]
    ranks.ends[1].send(Prepared(1, 1))
    ranks.recv()
    assert ranks.heard() == [[-1], [-1]]


@pytest.mark.parametrize("culprit", [0, 1])
def test_of_several_that_failed_the_first_is_named(ranks: Meeting, culprit: int) -> None:
    """Whichever is heard first: its peers may fail for lack of it before the core has looked."""
    peer = 1 - culprit
    ranks.ends[peer].send(Fatal(peer, "step 5", ErrorInfo("dead", "connection closed by peer"), 12.5))
    ranks.ends[culprit].send(Fatal(culprit, "step 5", ErrorInfo("dead", "told to raise"), 12.0))
    with pytest.raises(WorkerError, match=f"worker {culprit}, in phase 'step 5': told to raise"):
        ranks.recv()
