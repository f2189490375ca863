"""A bug in the core itself: its process ends and says why, another takes over, and streams stay exact."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    ConfigError,
    RequestCrashedError,
    RequestOutputKind,
    SamplingParams,
)
from headrace.frontend.engine_args import resolve
from headrace.ipc import process
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.payloads import CoreStart, Daemon

from .faulty_core import BUGS

VOCAB_SIZE = 1000
LENGTH = 1500
Args = Callable[..., AsyncEngineArgs]

pytestmark = pytest.mark.usefixtures("importable")


@pytest.fixture
def embed(oracle_args: Args, embed_other: Callable[[str], None]) -> Iterator[Callable[[], AsyncLLM]]:
    """Makes engines whose cores have bugs."""
    embed_other("faulty_core")
    engines = list[AsyncLLM]()

    def make() -> AsyncLLM:
        engines.append(AsyncLLM(oracle_args()))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


class Manager:
    """Starts a core of its own again whenever it has failed, as systemd would."""

    def __init__(self, args: AsyncEngineArgs, address: str) -> None:
        self.codes: list[int] = []
        self._start = CoreStart(resolve(args), address, None, Daemon())
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_over.is_set():
            child = process.spawn("core", "faulty_core:run", self._start)
            while child.exit_code is None and not self._is_over.wait(0.01):
                pass
            if child.exit_code is not None:
                self.codes.append(child.exit_code)
            child.stop(5)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


@pytest.fixture
def manager(oracle_args: Args, tmp_path: Path) -> Iterator[tuple[Manager, str]]:
    """A daemon with bugs, and its address."""
    (tmp_path / "run").mkdir(mode=0o700)
    address = f"ipc://{tmp_path}/run/core"
    manager = Manager(oracle_args(), address)
    yield manager, address
    manager.close()


def attach(address: str) -> AsyncLLM:
    deadline = time.monotonic() + 60
    while True:
        try:
            return AsyncLLM(AsyncEngineArgs(engine_core_address=address))
        except ConfigError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


async def stream(engine: AsyncLLM, number: int, *prompt: int) -> list[int]:
    delta = RequestOutputKind.DELTA
    params = SamplingParams(max_tokens=LENGTH, seed=number, ignore_eos=True, output_kind=delta)
    tokens: list[int] = []
    async for output in engine.generate(list(prompt), params, str(number)):
        tokens += output.outputs[0].token_ids
    return tokens


async def poison(engine: AsyncLLM, bug: str) -> None:
    """One request meets the bug, others run beside it."""
    good = [asyncio.create_task(stream(engine, number, number, 5)) for number in range(16)]
    while engine.num_unfinished_requests < len(good):  # noqa: ASYNC110 (nobody announces it)
        await asyncio.sleep(0)
    with pytest.raises(RequestCrashedError):
        await stream(engine, 500, BUGS[bug], 7)
    for number, tokens in enumerate(await asyncio.gather(*good)):
        assert tokens == oracle_stream([number, 5], number, LENGTH, VOCAB_SIZE)
    assert await stream(engine, 501, 8) == oracle_stream([8], 501, LENGTH, VOCAB_SIZE)
    stats, _ = await engine.get_stats()
    assert stats.num_free_blocks == stats.num_blocks
    await engine.check_health()


@pytest.mark.parametrize("bug", ["check", "schedule"])
def test_an_embedded_core_that_raises(
    embed: Callable[[], AsyncLLM], bug: str, capfd: pytest.CaptureFixture[str]
) -> None:
    engine = embed()
    asyncio.run(asyncio.wait_for(poison(engine, bug), 250))
    log = capfd.readouterr().err
    assert log.count("a fault of the core itself") == engine._client.num_restarts >= 2
    assert "AssertionError: a bug" in log


def test_a_daemon_that_raises(manager: tuple[Manager, str]) -> None:
    """Of two frontends, each of which has requests that might be the cause."""
    engine, other = attach(manager[1]), attach(manager[1])

    async def main() -> None:
        beside = [asyncio.create_task(stream(other, number, 9)) for number in range(3)]
        await poison(engine, "update")
        for number, tokens in enumerate(await asyncio.gather(*beside)):
            assert tokens == oracle_stream([9], number, LENGTH, VOCAB_SIZE)

    asyncio.run(asyncio.wait_for(main(), 250))
    for each in (engine, other):
        each.shutdown()
    assert len(manager[0].codes) >= 2
    assert set(manager[0].codes) == {1}


def test_a_call_that_cores_die_of_fails_alone(embed: Callable[[], AsyncLLM]) -> None:
    engine = embed()

    async def main() -> None:
        good = asyncio.create_task(stream(engine, 1, 2))
        with pytest.raises(RequestCrashedError) as caught:
            await engine.is_paused()
        assert (caught.value.parameter, caught.value.value) == ("method", "is_paused")
        assert await good == oracle_stream([2], 1, LENGTH, VOCAB_SIZE)
        assert not await engine.is_sleeping()

    asyncio.run(asyncio.wait_for(main(), 250))
