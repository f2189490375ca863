"""Calls one by one, and what becomes of them when the workers fail meanwhile; without workers or sockets."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import pytest
from headrace.core.control import MAX_WAITING, Control
from headrace.core.request import Request
from headrace.core.scheduler import Pause, Scheduler
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import ErrorInfo, ErrorKind, OverloadedError, RequestError
from headrace.ipc.messages import Argument, Call, Command, CommandResult, Reply, Sampling, StepResult, pack

MakeConfig = Callable[..., EngineConfig]


class Rig:
    """A control with its scheduler, and the workers' part played by hand."""

    def __init__(self, config: EngineConfig, num_ranks: int = 2) -> None:
        self.scheduler = Scheduler(config, 16, config.max_model_len)
        self.serving = True
        self.num_aborts = 0
        self.control = Control(self.scheduler, num_ranks, lambda: self.serving, self._abort)
        self.num_calls = 0

    def _abort(self) -> None:
        self.num_aborts += 1

    def call(self, name: str, client: bytes = b"a", **arguments: Argument) -> int:
        self.num_calls += 1
        self.control.call(client, Call(self.num_calls, name, arguments))
        return self.num_calls

    def paused(self) -> Pause:
        return self.scheduler.paused

    def replies(self) -> list[tuple[bytes, Reply]]:
        return self.control.advance()

    def command(self) -> Command:
        (command,) = self.control.take_commands()
        return command


@pytest.fixture
def rig(make_config: MakeConfig) -> Rig:
    return Rig(make_config())


def test_every_rank_answers_and_the_results_are_in_their_order(rig: Rig) -> None:
    number = rig.call("collective_rpc", method="rank")
    assert rig.replies() == []
    command = rig.command()
    for rank in (1, 0):
        assert rig.replies() == []
        rig.control.hear(CommandResult(rank, command.number, {"rank": rank}))
    assert rig.replies() == [(b"a", Reply(number, results=[{"rank": 0}, {"rank": 1}]))]


def test_calls_take_turns(rig: Rig) -> None:
    first = rig.call("collective_rpc", method="rank")
    second = rig.call("pause_generation", b"b")
    assert rig.replies() == []
    assert rig.paused() is Pause.NOTHING
    number = rig.command().number
    for rank in range(2):
        rig.control.hear(CommandResult(rank, number))
    assert [reply.call for _, reply in rig.replies()] == [first, second]
    assert rig.paused() is Pause.EVERYTHING
    assert rig.num_aborts == 1


def test_what_the_workers_were_asked_when_they_failed_is_an_error(rig: Rig) -> None:
    rig.call("sleep")
    assert rig.replies() == []
    old = rig.command()
    rig.control.workers_lost()
    ((_, reply),) = rig.replies()
    assert reply.error is not None
    assert "failed during sleep" in reply.error.message
    rig.control.hear(CommandResult(0, old.number))  # from the old ones
    # What came up is awake, but the engine stays paused until somebody wakes it.
    assert rig.control.sleep_level == 0
    assert rig.paused() is Pause.EVERYTHING
    rig.call("wake_up")
    ((_, reply),) = rig.replies()
    assert reply.ok
    assert rig.paused() is Pause.NOTHING
    assert rig.control.sleep_level is None


def test_waking_part_by_part_those_that_died_asleep(rig: Rig) -> None:
    """They came back awake; whoever wakes the KV cache last wants to go on."""
    rig.call("sleep")
    rig.replies()
    number = rig.command().number
    for rank in range(2):
        rig.control.hear(CommandResult(rank, number))
    rig.replies()
    rig.control.workers_lost()
    rig.call("wake_up", tags=["weights"])
    rig.replies()
    assert rig.paused() is Pause.EVERYTHING
    rig.call("wake_up", tags=["kv_cache"])
    rig.replies()
    assert rig.paused() is Pause.NOTHING
    assert rig.control.take_commands() == []


@pytest.mark.parametrize("kind", ["request", "config", "dead"])
def test_an_error_of_a_worker_is_the_answer_whatever_its_kind(rig: Rig, kind: ErrorKind) -> None:
    """Weights that are no longer where they were are a ConfigError: a pity for the caller, and no more."""
    rig.call("wake_up")
    rig.control._asleep |= {"weights", "kv_cache", "scheduling"}
    rig.replies()
    number = rig.command().number
    error = ErrorInfo(kind, "the weights are gone", "model")
    for rank in range(2):
        rig.control.hear(CommandResult(rank, number, error=error))
    ((_, reply),) = rig.replies()
    assert reply.error is not None
    assert (reply.ok, reply.error.kind, reply.error.message) == (False, kind, "the weights are gone")
    assert rig.control._asleep == {"weights", "kv_cache", "scheduling"}


def test_nothing_is_asked_of_workers_that_start(rig: Rig) -> None:
    rig.serving = False
    rig.call("collective_rpc", method="rank")
    assert rig.replies() == []
    assert rig.control.take_commands() == []
    rig.serving = True
    assert rig.replies() == []
    assert rig.command().name == "rank"


def test_an_answer_to_an_earlier_question_does_not_count(rig: Rig) -> None:
    rig.call("collective_rpc", method="rank")
    rig.replies()
    old = rig.command().number
    rig.control.workers_lost()
    rig.replies()
    number = rig.call("collective_rpc", method="rank")
    rig.replies()
    new = rig.command().number
    for rank in range(2):
        rig.control.hear(CommandResult(rank, old))
    assert rig.replies() == []
    for rank in range(2):
        rig.control.hear(CommandResult(rank, new))
    assert [reply.call for _, reply in rig.replies()] == [number]


def test_nobody_waits_for_requests_that_sleep(rig: Rig) -> None:
    """They end when the engine is awake, and not before."""
    rig.scheduler.add(Request(b"", 0, array("i", [1, 2]), Sampling(), 9))
    plan = rig.scheduler.schedule(0.0)
    assert plan is not None
    rig.scheduler.update(StepResult(plan.step, pack([5])))
    rig.call("sleep", mode="keep")
    rig.replies()
    number = rig.command().number
    for rank in range(2):
        rig.control.hear(CommandResult(rank, number))
    rig.replies()
    assert rig.scheduler.has_started_requests
    waits = rig.call("pause_generation", mode="wait", clear_cache=False)
    assert rig.replies() == [(b"a", Reply(waits))]


def test_a_pause_waits_for_the_plans_in_flight(rig: Rig) -> None:
    rig.scheduler.add(Request(b"", 0, array("i", [1, 2]), Sampling(), 9))
    plan = rig.scheduler.schedule(0.0)
    assert plan is not None
    number = rig.call("pause_generation", mode="keep")
    assert rig.replies() == []
    assert rig.scheduler.schedule(0.0) is None
    rig.scheduler.update(StepResult(plan.step, pack([5])))
    assert rig.replies() == [(b"a", Reply(number))]
    assert rig.scheduler.stats().num_free_blocks == 16


def test_a_pause_ends_with_the_client_that_died_over_it(rig: Rig) -> None:
    rig.call("pause_generation", b"a", mode="keep")
    rig.replies()
    assert not rig.control.client_vanished(b"b")
    rig.replies()
    assert rig.paused() is Pause.EVERYTHING
    assert rig.control.client_vanished(b"a")
    rig.replies()
    assert rig.paused() is Pause.NOTHING
    assert not rig.control.client_vanished(b"a")


def test_a_client_that_dies_while_it_waits_for_the_pause(rig: Rig) -> None:
    rig.call("collective_rpc", b"b", method="rank")
    rig.call("pause_generation", b"a")
    rig.replies()
    assert rig.control.client_vanished(b"a")
    number = rig.command().number
    for rank in range(2):
        rig.control.hear(CommandResult(rank, number))
    rig.replies()
    assert rig.paused() is Pause.NOTHING


def test_what_a_client_asked_is_not_begun_after_its_death(rig: Rig) -> None:
    """Nobody would know that the engine sleeps, or wake it."""
    rig.call("collective_rpc", b"b", method="rank")
    rig.replies()
    rig.call("sleep", b"a")
    waits = rig.call("reset_prefix_cache", b"b")
    assert rig.control.client_vanished(b"a")
    number = rig.command().number
    for rank in range(2):
        rig.control.hear(CommandResult(rank, number))
    assert (b"b", Reply(waits)) in rig.replies()
    assert rig.control.take_commands() == []
    assert (rig.control.sleep_level, rig.paused(), rig.num_aborts) == (None, Pause.NOTHING, 0)


def test_a_pause_that_another_client_has_taken_over_stays(rig: Rig) -> None:
    for client in (b"a", b"b"):
        rig.call("pause_generation", client)
        rig.replies()
    rig.control.client_vanished(b"a")
    rig.replies()
    assert rig.paused() is Pause.EVERYTHING


def test_memory_is_not_taken_back_for_a_dead_client(rig: Rig) -> None:
    rig.call("sleep", b"a")
    rig.replies()
    number = rig.command().number
    for rank in range(2):
        rig.control.hear(CommandResult(rank, number))
    rig.replies()
    assert rig.control.client_vanished(b"a")
    rig.replies()
    assert (rig.control.sleep_level, rig.paused()) == (1, Pause.EVERYTHING)


def test_refusals(rig: Rig) -> None:
    for method, arguments in (("exec", {}), ("sleep", {"level": 3}), ("sleep", {"x": 1})):
        with pytest.raises(RequestError):
            rig.call(method, **arguments)  # type: ignore[arg-type]
    for _ in range(MAX_WAITING):
        rig.call("collective_rpc", method="rank")
    with pytest.raises(OverloadedError):
        rig.call("collective_rpc", method="rank")
