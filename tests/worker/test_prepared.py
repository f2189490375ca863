"""What a rank of several prepares in idle time: it says so, and begins anew when sleep has taken it away."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from headrace.ipc.messages import (
    Allocate,
    Command,
    CommandResult,
    FromWorker,
    Prepared,
    Progress,
    ToWorker,
    UsePrepared,
    WorkerReady,
)
from headrace.ipc.odometer import Odometers
from headrace.ipc.payloads import WorkerStart
from headrace.ipc.pipe import Pipe, PipeClosedError, socket_pair
from headrace.worker.kv_cache import CacheSize
from headrace.worker.main import Runner, Worker

if TYPE_CHECKING:
    from tests.worker.conftest import MakeConfig

CHORES = 2


class Diligent:
    """A GPU's runner, but that it only counts what it would record."""

    def __init__(self) -> None:
        self.in_use = 0
        self._left = CHORES

    def load(self, progress: Callable[[str], None]) -> CacheSize:
        return CacheSize(8, 1, "8 of 1")

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        self._left, self.in_use = CHORES, 0

    def warm_up(self) -> None:
        """There is nothing to compile."""

    def idle(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def use_prepared(self, count: int) -> None:
        assert self.in_use <= count <= CHORES - max(self._left, 0), "it was not prepared"
        self.in_use = count

    def release(self, keep_weights: bool) -> None:
        self._left = 0

    def restore_weights(self) -> None:
        """They are there."""

    def restore_cache(self) -> None:
        self.allocate(8, 64)


class Rank(Worker):
    """A worker whose runner is `Diligent`."""

    diligent: Diligent

    def _make_runner(self) -> Runner:
        runner: Any = self.diligent
        return runner  # type: ignore[no-any-return]


@pytest.fixture
def rank(make_config: MakeConfig) -> Iterator[tuple[Diligent, Pipe[ToWorker, FromWorker]]]:
    """Rank 1 of 2 in a thread, and the core's end of its pipe."""
    ours, theirs = socket_pair()
    odometers = Odometers(2)
    start = WorkerStart(make_config(tensor_parallel_size=2), 1, theirs.fileno(), "", odometers.fd)
    worker = Rank(start, Pipe(theirs, ToWorker, 1 << 20))
    worker.diligent = Diligent()

    def run() -> None:
        with suppress(PipeClosedError):
            worker.run()

    thread = threading.Thread(target=run)
    thread.start()
    pipe: Pipe[ToWorker, FromWorker] = Pipe(ours, FromWorker)
    pipe.send(Allocate(8, 64))
    while not isinstance(pipe.recv(30), WorkerReady):
        pass
    yield worker.diligent, pipe
    ours.close()
    thread.join(30)
    assert not thread.is_alive()
    theirs.close()
    odometers.close()
    gc.unfreeze()


@pytest.fixture
def long_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.worker.main._QUIET", 60.0)


def told(pipe: Pipe[ToWorker, FromWorker], until: type[Any] | int) -> list[int]:
    """The counts of `Prepared` up to this message or count."""
    counts: list[int] = []
    while True:
        message = pipe.recv(30)
        assert message is not None
        if isinstance(message, Prepared):
            counts.append(message.count)
            if message.count == until:
                return counts
        elif not isinstance(message, Progress) and isinstance(until, type) and isinstance(message, until):
            return counts


def test_what_sleep_took_away_is_prepared_and_counted_anew(
    rank: tuple[Diligent, Pipe[ToWorker, FromWorker]],
) -> None:
    diligent, pipe = rank
    assert told(pipe, CHORES) == [1, 2]
    pipe.send(UsePrepared(2))
    pipe.send(Command(1, "sleep", {"level": 1}))
    assert told(pipe, CommandResult) == [0]
    assert diligent.in_use == 2
    pipe.send(UsePrepared(2))  # sent before the core heard of the sleep
    pipe.send(Command(2, "wake_up", {"tags": ["weights", "kv_cache"]}))
    assert told(pipe, CommandResult) == [0]
    assert diligent.in_use == 0
    assert told(pipe, CHORES) == [1, 2]
    pipe.send(UsePrepared(1))
    pipe.send(Command(3, "rank"))
    told(pipe, CommandResult)
    assert diligent.in_use == 1


@pytest.mark.usefixtures("long_quiet")
def test_what_comes_right_after_the_start_waits_for_no_preparation(
    rank: tuple[Diligent, Pipe[ToWorker, FromWorker]],
) -> None:
    _, pipe = rank
    pipe.send(Command(1, "rank"))
    assert told(pipe, CommandResult) == []
