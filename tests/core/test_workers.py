"""Workers through their lives: real processes, driven as the engine drives them."""

from __future__ import annotations

import os
import select
import signal
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from headrace.core import ranks, watch, workers
from headrace.core.cache_size import size_cache
from headrace.core.ranks import WorkerError
from headrace.core.workers import MAX_RESTARTS, Workers
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import Admit, Progress, Sampling, StepPlan, StepResult, pack

MakeConfig = Callable[..., EngineConfig]
BABBLER = """
import socket
import msgspec
from headrace.ipc.messages import (Allocate, Loaded, StepPlan, ToWorker, WorkerReady)
from headrace.ipc.payloads import WorkerStart
from headrace.ipc.pipe import Pipe, PipeClosedError

def run(payload):
    start = msgspec.json.decode(payload, type=WorkerStart)
    sock = socket.socket(fileno=start.fd)
    pipe = Pipe(sock, ToWorker)
    pipe.send(Loaded(start.rank, 9, 1, "none"))
    assert isinstance(pipe.recv(), Allocate)
    pipe.send(WorkerReady(start.rank))
    try:
        pipe.recv()
        sock.setblocking(True)
        sock.sendall({garbage!r})
        pipe.recv()
    except PipeClosedError:
        pass
"""

SLOW_ASSEMBLER = """#!/bin/sh
while [ "$1" != --version ] && [ -e {slow} ]; do sleep 0.1; done
exec {ptxas} "$@"
"""


def prefill(step: int = 0, prompt_length: int = 3) -> StepPlan:
    tokens = array("i", range(prompt_length)).tobytes()
    admit = Admit(0, tokens, prompt_length, 0, pack([0]), Sampling())
    return StepPlan(step, b"", [admit], b"", pack([0]), pack([prompt_length]))


@pytest.fixture
def bring_up(make_config: MakeConfig) -> Iterator[Callable[..., Workers]]:
    """Starts workers; `bring_up(**config changes)`."""
    started: list[Workers] = []

    def make(**changes: object) -> Workers:
        config = make_config(**changes)
        started.append(Workers(config))
        started[-1].bring_up(partial(size_cache, config), lambda progress: None)
        return started[-1]

    yield make
    for each in started:
        each.close()


def answer(crew: Workers, seconds: float = 30.0) -> StepResult:
    """The next result; as the engine, it polls while there is none."""
    deadline = time.monotonic() + seconds
    while (result := crew.recv()) is None:
        assert time.monotonic() < deadline
        select.select(crew.descriptors(), [], [], crew.patience_ms / 1000)
    assert isinstance(result, StepResult)
    return result


def revive(crew: Workers) -> None:
    deadline = time.monotonic() + 30
    while not crew.are_serving:
        assert crew.trouble
        assert crew.recv() is None
        assert time.monotonic() < deadline
        select.select(crew.descriptors(), [], [], crew.patience_ms / 1000)


def test_a_new_life_with_the_same_cache(bring_up: Callable[..., Workers]) -> None:
    crew = bring_up(tensor_parallel_size=2)
    crew.send(prefill())
    first = answer(crew)
    victim = os.pidfd_open(pids(crew)[1])
    os.kill(pids(crew)[1], signal.SIGKILL)
    select.select([victim], [], [])
    os.close(victim)
    with pytest.raises(WorkerError, match=r"worker 1, in phase 'serving'.*SIGKILL") as failure:
        answer(crew)
    crew.fail(failure.value)
    revive(crew)
    crew.send(prefill())
    assert answer(crew) == first
    assert (crew.num_restarts, crew.trouble) == (1, "")


def pids(crew: Workers) -> list[int]:
    assert crew._ranks is not None
    return list(crew._ranks.pids().values())


def compiles(crew: Workers) -> bool:
    assert crew._ranks is not None
    return any(each.kernel for each in crew._ranks._compilations.values())


@pytest.mark.parametrize(
    ("garbage", "says"),
    [
        (b"\x03\0\0\0abc", "cannot be decoded"),
        (b"\xff\xff\xff\xffabc", "a frame of 4294967295 bytes"),
        (b"\x0f\0\0\0\x92\xabWorkerReady\x00..", "cannot be decoded|sent WorkerReady"),
    ],
)
def test_babble(
    bring_up: Callable[..., Workers],
    garbage: bytes,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "headrace_babbler.py").write_text(BABBLER.replace("{garbage!r}", repr(garbage)))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(ranks, "ENTRY", "headrace_babbler:run")
    crew = bring_up()
    crew.send(prefill())
    with pytest.raises(WorkerError, match=says):
        answer(crew)


def test_failures_in_a_row_end_with_the_first_cause(
    bring_up: Callable[..., Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_BACKOFF", 0.1)
    crew = bring_up()
    causes = [crew._ranks.failure(0, f"cause {number}") for number in range(MAX_RESTARTS + 1) if crew._ranks]
    for cause in causes[:-1]:
        crew.fail(cause)
        revive(crew)
    with pytest.raises(WorkerError, match="cause 0"):
        crew.fail(causes[-1])
    crew.fail(causes[-1], progress=True)  # the culprit was found: it is not hopeless
    revive(crew)
    crew.send(prefill())
    answer(crew)
    crew.fail(causes[0])  # nor is it for workers that have answered
    assert crew._failures == causes[:1]


def test_a_rank_that_stalls_in_its_start_is_named(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tensor_parallel_size=2)
    crew = Workers(config)
    began, reported = time.monotonic(), set[int | None]()

    def stop_one(progress: Progress) -> None:
        if progress.rank == 1:
            os.kill(pids(crew)[1], signal.SIGSTOP)
        reported.add(progress.rank)
        if reported >= {0, 1}:
            monkeypatch.setattr(workers, "START_SECONDS", time.monotonic() - began + 1.0)

    try:
        with pytest.raises(WorkerError, match=r"worker 1, in phase '.+': took too long to start"):
            crew.bring_up(partial(size_cache, config), stop_one)
    finally:
        crew.close()


def test_a_plan_that_does_not_fit_into_the_pipe_stops_nobody(bring_up: Callable[..., Workers]) -> None:
    """A stopped worker reads nothing; sending to it returns at once, and all arrives when it goes on."""
    length = 3_000_000
    crew = bring_up(max_model_len=length + 1, num_gpu_blocks_override=length, block_size=4)
    os.kill(pids(crew)[0], signal.SIGSTOP)
    blocks = pack(range(-(-length // 4)))
    tokens = array("i", bytes(4 * length)).tobytes()
    admit = Admit(0, tokens, length, length - 1, blocks, Sampling())
    began = time.monotonic()
    crew.send(StepPlan(0, b"", [admit], b"", pack([0]), pack([1])))
    assert crew.recv() is None
    assert time.monotonic() - began < 20  # it would wait for ever
    assert crew.patience_ms < 100
    os.kill(pids(crew)[0], signal.SIGCONT)
    assert answer(crew).step == 0


def test_a_kernel_that_is_compiled_is_no_hang_unless_it_takes_too_long(
    bring_up: Callable[..., Workers],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    triton = pytest.importorskip("triton.backends.nvidia.compiler", reason="Triton is not installed here")
    slow, ptxas = tmp_path / "slow", tmp_path / "ptxas"
    ptxas.write_text(SLOW_ASSEMBLER.format(slow=slow, ptxas=triton.get_ptxas(90).path))
    ptxas.chmod(0o700)
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(name, str(ptxas))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.setattr(ranks, "ENTRY", "compiling_worker:run")
    caplog.set_level("INFO")
    crew = bring_up(device="cuda", hang_seconds=5)

    def poll_while(go_on: Callable[[], bool]) -> None:
        while go_on():
            assert crew.recv() is None
            select.select(crew.descriptors(), [], [], 0.1)

    try:
        slow.touch()
        crew.send(prefill())
        poll_while(lambda: not compiles(crew))
        until = time.monotonic() + watch.SUSPICIOUS_SECONDS + 2 * watch.LOOK_SECONDS
        poll_while(lambda: time.monotonic() < until and crew.trouble == "")
        assert crew.trouble == ""
        slow.unlink()
        assert answer(crew).step == 0
        (said,) = (vars(each)["fields"] for each in caplog.records if each.message == "compiled a kernel")
        assert (said["rank"], said["kernel"]) == (0, "_copy_segments_kernel")
        assert said["seconds"] > watch.SUSPICIOUS_SECONDS
        slow.touch()
        monkeypatch.setattr(watch, "COMPILE_SECONDS", 1.0)
        crew.send(StepPlan(1, b"", [], b"", None, pack([1])))
        with pytest.raises(
            WorkerError, match=r"worker 0.* hangs: worker 0 is compiling _copy_segments_kernel for"
        ):
            answer(crew)
    finally:
        slow.unlink(missing_ok=True)  # lets the assembler end, whose worker is gone
