"""Whichever process of an engine is killed, however and whenever: nothing is left of it in the end.

A program runs two ranks; one of its processes is killed. When it is the program, everything goes with it.
When it is the core or a worker, a running engine goes on and one that starts fails; then the program ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from .cores import Gate

PROGRAM = """
import asyncio, sys
from headrace import AsyncEngineArgs, AsyncLLM, EngineDeadError, SamplingParams

async def main():
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    print("first", flush=True)
    async for _ in engine.generate([1], params):
        pass
    print("running", flush=True)
    sys.stdin.readline()  # until the victim is dead
    async for output in engine.generate([2], params):
        pass
    print("went on", flush=True)

try:
    engine = AsyncLLM(AsyncEngineArgs(model={folder!r}, load_format="oracle", skip_tokenizer_init=True,
                                      num_gpu_blocks_override=500, tensor_parallel_size=2))
except EngineDeadError as error:
    print("did not start:", error, flush=True)
else:
    asyncio.run(main())
"""
VICTIMS = ("program", "core", "worker")
WAYS = ("SIGTERM", "SIGKILL", "SIGSTOP then SIGKILL")


@pytest.fixture
def temp(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "temp"
    folder.mkdir()
    yield folder
    wait_until_gone(lambda: [path.name for path in folder.iterdir()])


def wait_until_gone(look: Callable[[], Sequence[object]], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while left := look():
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def family(pid: int, size: int) -> list[psutil.Process]:
    """The program's core and the core's workers, as soon as there are `size` of them."""
    deadline = time.monotonic() + 60
    program = psutil.Process(pid)
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = program.children()
            members = [*children, *(grand for child in children for grand in child.children())]
            if len(members) >= size:
                return members
        assert time.monotonic() < deadline
        time.sleep(0.001)


def kill(victim: psutil.Process, way: str) -> None:
    for name in way.split(" then "):
        victim.send_signal(signal.Signals[name])


def shared_memory() -> set[str]:
    """Not that of a browser, which another test may have open."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(".org.chromium")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("phase", ["starting", "running"])
def test_nothing_is_left(
    phase: str, victim: str, way: str, oracle_folder: Path, temp: Path, tmp_path: Path
) -> None:
    shared = shared_memory()
    gate = Gate(tmp_path)
    if phase == "starting":
        gate.close()
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(folder=str(oracle_folder))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temp), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": gate.python_path},
    )
    assert program.stdin is not None
    assert program.stdout is not None
    if phase == "running":
        while program.stdout.readline() != "running\n":
            assert program.poll() is None
    members = family(program.pid, 1 + VICTIMS.index(victim) // 2 if phase == "starting" else 3)
    kill({"program": psutil.Process(program.pid), "core": members[0], "worker": members[-1]}[victim], way)
    gate.open()
    if victim != "program":
        with contextlib.suppress(BrokenPipeError):
            program.stdin.write("\n")
    out, _ = program.communicate(timeout=60)
    if victim == "program":
        assert program.returncode < 0
    else:
        assert program.returncode == 0
        assert out.startswith("did not start:" if phase == "starting" else "went on")
    wait_until_gone(lambda: [each for each in members if each.is_running()])
    assert shared_memory() <= shared


def test_a_stopped_worker_goes_with_its_core(oracle_folder: Path, temp: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(folder=str(oracle_folder))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temp), "CUDA_VISIBLE_DEVICES": ""},
    )
    with program:
        assert program.stdout is not None
        assert program.stdout.readline() == "first\n"
        members = family(program.pid, 3)
        members[-1].suspend()
        program.kill()
        wait_until_gone(lambda: [each for each in members if each.is_running()])
