"""A real worker process, driven over its pipe as the core drives it (oracle backend)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
import pytest
from headrace.ipc.messages import Allocate, Fatal, Progress, StepPlan, StepResult, ToWorker, pack, unpack
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.pipe import PipeClosedError

if TYPE_CHECKING:
    from tests.worker.conftest import Request, StartWorker, Traffic

VOCAB = 1000


def oracle(request: Request) -> list[int]:
    """What the request must have got."""
    return oracle_stream(request.prompt, request.seed, len(request.output), VOCAB)


@pytest.mark.parametrize("poison", [False, True])
def test_random_plans_give_the_oracles_streams(
    start_worker: StartWorker, traffic: Traffic, poison: bool
) -> None:
    worker = start_worker(poison_blocks=poison)
    worker.start()
    requests = traffic.run(600, worker.step)
    assert len(requests) > 20
    assert sum(len(request.output) for request in requests) > 600
    assert all(request.output == oracle(request) for request in requests)


@pytest.mark.parametrize("poison", [False, True])
def test_poison_shows_who_reads_a_block_that_was_given_to_another(
    start_worker: StartWorker, new_request: type[Request], poison: bool
) -> None:
    """The core's mistake: block 9 goes to the second request, and the third finds a prefix there."""
    first, second, third = (new_request(slot, [7, 8, 9, 10, 11], seed=5) for slot in range(3))
    first.blocks, second.blocks, third.blocks = [9, 8], [9, 7], [9, 6]
    hit = msgspec.structs.replace(third.admit(), num_computed=4)
    worker = start_worker(poison_blocks=poison)
    worker.start()
    results: list[int] = []
    for plan in (
        StepPlan(0, b"", [first.admit()], b"", pack([0]), pack([5])),
        StepPlan(1, pack([0]), [second.admit()], b"", pack([1]), pack([1])),
        StepPlan(2, b"", [hit], b"", pack([2]), pack([1])),
    ):
        worker.pipe.send(plan)
        result = worker.recv()
        assert isinstance(result, StepResult)
        results += unpack(result.tokens)
    right = oracle_stream(first.prompt, 5, 1, VOCAB)
    assert results[:1] == right
    assert (results[1:] == right) == (not poison)


def test_steps_follow_one_another_without_their_tokens(
    start_worker: StartWorker, new_request: type[Request]
) -> None:
    """The core sends plans before it knows the tokens of earlier ones; a rank that is not 0 never answers."""
    request = new_request(3, [7, 8, 9], seed=5)
    request.blocks = [9, 8]
    plans = [StepPlan(0, b"", [request.admit()], b"", pack([3]), pack([3]))]
    plans += [
        StepPlan(step, b"", [], pack([3, 20 + step] if step % 4 == 0 else []), None, None)
        for step in range(1, 20)
    ]
    results: list[int] = []
    workers = [start_worker(rank, tensor_parallel_size=2) for rank in range(2)]
    for worker in workers:
        worker.start()
        for plan in plans:
            worker.pipe.send(plan)
    for plan in plans:
        result = workers[0].recv()
        assert isinstance(result, StepResult)
        assert result.step == plan.step
        results += unpack(result.tokens)
    assert results == oracle_stream(request.prompt, 5, 20, VOCAB)
    workers[1].pipe.send(
        StepPlan(20, b"", [], b"", pack([0]), None)
    )  # a free slot: the answer proves the rest ran
    fatal = workers[1].recv()
    assert isinstance(fatal, Fatal)
    assert fatal.rank == 1


def test_a_prefix_hit_reads_what_another_row_writes(
    start_worker: StartWorker, new_request: type[Request]
) -> None:
    worker = start_worker()
    worker.start()
    first, second = new_request(0, [1, 2, 3, 4, 5], 1), new_request(1, [1, 2, 3, 4, 6], 2)
    first.blocks, second.blocks, second.num_computed = [7, 3], [7, 5], 4
    plan = StepPlan(0, b"", [first.admit(), second.admit()], b"", pack([0, 1]), pack([5, 1]))
    tokens = worker.step(plan)
    assert tokens == [oracle_stream(r.prompt, r.seed, 1, VOCAB)[0] for r in (first, second)]


def test_a_wrong_block_changes_the_stream(start_worker: StartWorker, new_request: type[Request]) -> None:
    """The oracle really reads its states through the block table."""
    worker = start_worker()
    worker.start()
    request = new_request(0, [1, 2, 3, 4, 5], 1)
    request.blocks, request.num_computed = [7, 3], 4  # nobody has computed block 7
    tokens = worker.step(StepPlan(0, b"", [request.admit()], b"", pack([0]), pack([1])))
    assert tokens != oracle_stream(request.prompt, 1, 1, VOCAB)


def test_the_first_message_is_progress_and_hanging_up_ends_it_quietly(
    start_worker: StartWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = start_worker()
    assert isinstance(worker.recv(), Progress)
    worker.start()
    worker.sock.close()
    assert worker.ended().endswith("exited with code 0")
    assert capfd.readouterr() == ("", "")


def test_hanging_up_during_the_start_ends_it_quietly(
    start_worker: StartWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = start_worker()
    worker.sock.close()
    assert worker.ended().endswith("exited with code 0")
    assert capfd.readouterr() == ("", "")


def test_no_room_for_a_block_is_the_callers_error(
    start_worker: StartWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = start_worker(num_gpu_blocks_override=None, kv_cache_memory_bytes=3)
    fatal = worker.skip_progress()
    assert isinstance(fatal, Fatal)
    assert (fatal.error.kind, fatal.error.parameter, fatal.error.value) == (
        "config",
        "kv_cache_memory_bytes",
        "3",
    )
    assert worker.ended().endswith("exited with code 1")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (StepPlan(4, b"", [], b"", pack([1]), None), "free slot"),
        (StepPlan(4, b"", [], b"abc", None, None), "buffer size"),
        (Allocate(1, 2), "expected StepPlan"),
    ],
)
def test_a_plan_that_makes_no_sense_is_fatal(
    start_worker: StartWorker, capfd: pytest.CaptureFixture[str], message: ToWorker, says: str
) -> None:
    worker = start_worker()
    worker.start()
    began = time.monotonic()
    worker.pipe.send(message)
    fatal = worker.recv()
    assert isinstance(fatal, Fatal)
    assert fatal.error.kind == "dead"
    assert began < fatal.at < time.monotonic()
    assert says in fatal.error.message
    assert worker.ended().endswith("exited with code 1")
    assert "Traceback" in capfd.readouterr().err
    with pytest.raises(PipeClosedError):
        worker.pipe.recv(5)
