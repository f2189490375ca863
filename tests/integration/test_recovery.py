"""Faults under load: every stream that was accepted goes on, exact to the token."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    ConfigError,
    EngineUnhealthyError,
    RequestCrashedError,
    RequestOutputKind,
    SamplingParams,
)
from headrace.frontend.engine_args import resolve
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.payloads import CoreStart
from headrace.ipc.process import spawn

from .cores import free_port

VOCAB_SIZE = 1000
Args = Callable[..., AsyncEngineArgs]
FAULTS = {"raise": 996, "exit": 997, "hang": 998, "garbage": 999}


@pytest.fixture
def small(oracle_args: Args) -> Iterator[AsyncLLM]:
    """An engine of its own for a test that harms it.

    Faults that follow each other so closely that one request seems to be the cause do not end it.
    """
    engine = AsyncLLM(oracle_args(max_replays=100))
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def faulty(oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oracle that fails when a prompt holds certain tokens."""
    config = json.loads((oracle_folder / "config.json").read_text())
    folder = tmp_path_factory.mktemp("faulty")
    (folder / "config.json").write_text(json.dumps(config | {"oracle_faults": FAULTS}))
    return folder


def workers(engine: AsyncLLM) -> list[psutil.Process]:
    children: list[psutil.Process] = psutil.Process(engine._client.info.pid).children()
    return children


async def stream(
    engine: AsyncLLM,
    number: int,
    max_tokens: int,
    prompt: list[int] | None = None,
    fed: asyncio.Event | None = None,
) -> list[int]:
    """The tokens of one request, delta by delta; each sets `fed`."""
    params = SamplingParams(
        max_tokens=max_tokens, seed=number, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    tokens: list[int] = []
    async for output in engine.generate(prompt or [number, 1, 2, 3], params, str(number)):
        tokens += output.outputs[0].token_ids
        if fed is not None:
            fed.set()
    return tokens


def right(number: int, max_tokens: int) -> list[int]:
    return oracle_stream([number, 1, 2, 3], number, max_tokens, VOCAB_SIZE)


class Crowd:
    """64 readers, each of which reads one exact stream after the other until `end`."""

    def __init__(self, engine: AsyncLLM) -> None:
        self._is_over = False
        self._fed = asyncio.Event()
        self._readers = [asyncio.create_task(self._read(engine, number)) for number in range(64)]

    async def _read(self, engine: AsyncLLM, number: int) -> None:
        while not self._is_over:
            assert await stream(engine, number, 1500, fed=self._fed) == right(number, 1500)

    async def be_fed(self) -> None:
        """Returns when a token comes. Four faults in a row without one are an engine's end."""
        self._fed.clear()
        await self._fed.wait()

    async def end(self) -> None:
        """Returns when all have come to the ends of their streams."""
        self._is_over = True
        await asyncio.gather(*self._readers)


async def wait_for_restart(engine: AsyncLLM, number: int) -> None:
    while True:
        stats = (await engine._client.call("stats", 20)).stats
        assert stats is not None
        if stats.num_restarts >= number and workers(engine):
            return


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_streams_go_on_when_workers_are_killed(small: AsyncLLM, how: signal.Signals) -> None:
    choose = random.Random(int(how))

    async def main() -> None:
        crowd = Crowd(small)
        for restart in range(1, 6):
            if restart % 2:
                await crowd.be_fed()
            # Somewhere in the prefills, in the middle, or while the last restart is being replayed.
            await asyncio.sleep(choose.choice([0.005, 0.1, 0.3]))
            choose.choice(workers(small)).send_signal(how)
            await wait_for_restart(small, restart)
            while (await small._client.call("ping")).unhealthy:
                pass
        await crowd.end()

    asyncio.run(asyncio.wait_for(main(), 250))


@pytest.mark.parametrize("fault", ["raise", "exit", "garbage"])
def test_a_poison_request_ends_alone(oracle_args: Args, faulty: Path, fault: str) -> None:
    async def main(engine: AsyncLLM) -> None:
        good = [asyncio.create_task(stream(engine, number, 400)) for number in range(16)]
        await asyncio.sleep(0.02)
        bad = asyncio.create_task(stream(engine, 500, 400, [5, FAULTS[fault], 6]))
        good += [asyncio.create_task(stream(engine, number, 400)) for number in range(16, 32)]
        with pytest.raises(RequestCrashedError):
            await bad
        for number, tokens in enumerate(await asyncio.gather(*good)):
            assert tokens == right(number, 400)
        stats = (await engine._client.call("stats")).stats
        assert stats is not None
        assert (stats.num_restarts, stats.num_free_blocks) == (2, stats.num_blocks)
        await engine.check_health()

    engine = AsyncLLM(oracle_args(model=str(faulty)))
    asyncio.run(asyncio.wait_for(main(engine), 250))
    engine.shutdown()


async def first_trouble(engine: AsyncLLM) -> str:
    """What the first check of its health says that is not good."""
    while True:
        try:
            await engine.check_health()
        except EngineUnhealthyError as error:
            return str(error)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize(("busy", "num_ranks"), [(True, 1), (False, 1), (True, 2)])
def test_a_stopped_worker_turns_health_false(
    oracle_args: Args, busy: bool, num_ranks: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Within 10 seconds, with everybody's stacks in the log; then all goes on."""

    async def main(engine: AsyncLLM) -> None:
        victim = workers(engine)[-1]  # whichever rank it is: the first alone has to answer
        good = [asyncio.create_task(stream(engine, number, 1900)) for number in range(8 if busy else 0)]
        await asyncio.sleep(0.05)
        await engine.check_health()
        began = time.monotonic()
        victim.suspend()
        assert f"worker {num_ranks - 1}: stopped" in await first_trouble(engine)
        assert time.monotonic() - began < 10
        await wait_for_restart(engine, 1)
        assert await asyncio.gather(*good) == [right(number, 1900) for number in range(len(good))]
        assert await stream(engine, 99, 10) == right(99, 10)
        await engine.check_health()

    # Looks at its health once in 0.1 s must not miss the time from the first suspicion to the restart's end.
    engine = AsyncLLM(oracle_args(hang_seconds=6, tensor_parallel_size=num_ranks))
    asyncio.run(asyncio.wait_for(main(engine), 250))
    engine.shutdown()
    log = capfd.readouterr().err
    assert "hangs: no progress" in log
    assert 'core/workers.py", line' in log  # the core's stack
    assert 'worker/main.py", line' in log  # the worker's


def test_a_request_that_hangs_is_a_poison(oracle_args: Args, faulty: Path) -> None:
    async def main(engine: AsyncLLM) -> None:
        bad = asyncio.create_task(stream(engine, 500, 400, [5, FAULTS["hang"], 6]))
        good = [asyncio.create_task(stream(engine, number, 400)) for number in range(8)]
        with pytest.raises(RequestCrashedError):
            await bad
        assert await asyncio.gather(*good) == [right(number, 400) for number in range(8)]

    engine = AsyncLLM(oracle_args(model=str(faulty), hang_seconds=3))
    asyncio.run(asyncio.wait_for(main(engine), 250))
    engine.shutdown()


def test_a_saturated_engine_is_healthy(small: AsyncLLM) -> None:
    """Ten times more requests than run at once, and every check of its health is good."""

    async def main() -> None:
        prompts = [[number % 100, number // 100] for number in range(2560)]
        tasks = [
            asyncio.create_task(stream(small, number, 60, prompt)) for number, prompt in enumerate(prompts)
        ]
        while not all(task.done() for task in tasks):
            await small.check_health()
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)

    asyncio.run(asyncio.wait_for(main(), 250))


# --- the core --------------------------------------------------------------------------------------------


async def follow(engine: AsyncLLM, prompt: list[int], params: SamplingParams) -> dict[int, list[int]]:
    """The tokens of each of the request's completions."""
    streams: dict[int, list[int]] = {}
    async for output in engine.generate(prompt, params):
        for part in output.outputs:
            streams.setdefault(part.index, []).extend(part.token_ids)
    return streams


async def until(done: Callable[[], bool]) -> None:
    while not done():  # noqa: ASYNC110 (nobody announces it)
        await asyncio.sleep(0.005)


async def kill_core(engine: AsyncLLM, how: signal.Signals = signal.SIGKILL) -> None:
    """Returns when there is another one."""
    number = engine._client.num_restarts
    os.kill(engine._client.info.pid, how)
    await until(lambda: engine._client.num_restarts > number)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_streams_go_on_when_the_core_is_killed(small: AsyncLLM, how: signal.Signals) -> None:
    choose = random.Random(int(how))

    async def main() -> None:
        crowd = Crowd(small)
        for number in range(5):
            if number % 2 == 0:
                await crowd.be_fed()
            await asyncio.sleep(choose.choice([0.005, 0.1, 0.2]))
            await kill_core(small, how)
        await small.check_health()
        await crowd.end()
        stats = (await small._client.call("stats")).stats
        assert stats is not None
        assert (stats.num_blocks, stats.num_free_blocks) == (2000, 2000)

    asyncio.run(asyncio.wait_for(main(), 250))


def test_what_counts_tokens_counts_on_after_a_restart(small: AsyncLLM) -> None:
    """n, min_tokens and stop tokens; requests that come while there is no core, aborts, and health."""
    prompt = [9, 8, 7, 6]
    right_ones = [oracle_stream(prompt, seed, 1000, VOCAB_SIZE) for seed in (5, 6)]
    stop = right_ones[0][900]
    first = next(i for i, token in enumerate(right_ones[0]) if token == stop and i >= 600)

    async def main() -> None:
        delta = RequestOutputKind.DELTA
        params = SamplingParams(
            n=2, seed=5, max_tokens=1000, min_tokens=600, stop_token_ids=[stop], output_kind=delta
        )
        params.ignore_eos = True
        request = asyncio.create_task(follow(small, prompt, params))
        aborted = small.generate([3], SamplingParams(max_tokens=1900, ignore_eos=True))
        await anext(aborted)
        restart = asyncio.create_task(kill_core(small))
        await until(lambda: small._client.trouble != "")
        with pytest.raises(EngineUnhealthyError, match="SIGKILL"):
            await small.check_health()
        await small.abort(aborted.request_id)
        meanwhile = asyncio.create_task(stream(small, 77, 50))
        call = asyncio.create_task(small.reset_prefix_cache())
        await restart
        await call
        await small.check_health()
        assert await meanwhile == right(77, 50)
        streams = await request
        assert streams[0] == right_ones[0][: first + 1]
        end = next((i for i, token in enumerate(right_ones[1]) if token == stop and i >= 600), 999)
        assert streams[1] == right_ones[1][: end + 1]
        assert small.num_unfinished_requests == 0

    asyncio.run(asyncio.wait_for(main(), 250))


def test_a_core_that_dies_between_two_loops(small: AsyncLLM) -> None:
    assert asyncio.run(stream(small, 1, 20)) == right(1, 20)
    os.kill(small._client.info.pid, signal.SIGKILL)
    assert asyncio.run(asyncio.wait_for(stream(small, 2, 20), 250)) == right(2, 20)


def test_a_stopped_core_turns_health_false_and_is_replaced(
    oracle_args: Args, capfd: pytest.CaptureFixture[str]
) -> None:
    async def main(engine: AsyncLLM) -> None:
        good = [asyncio.create_task(stream(engine, number, 1900)) for number in range(8)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        os.kill(engine._client.info.pid, signal.SIGSTOP)
        assert "silent" in await first_trouble(engine)
        assert time.monotonic() - began < 10
        assert await asyncio.gather(*good) == [right(number, 1900) for number in range(8)]
        await engine.check_health()

    engine = AsyncLLM(oracle_args(hang_seconds=5))
    asyncio.run(asyncio.wait_for(main(engine), 250))
    assert engine._client.num_restarts == 1
    engine.shutdown()
    log = capfd.readouterr().err
    assert 'core/engine.py", line' in log
    assert 'worker/main.py", line' in log


class Standalone:
    """A core with a manager that starts it again."""

    def __init__(self, args: AsyncEngineArgs, address: str) -> None:
        self._start = CoreStart(resolve(args), address, None)
        self._child = spawn("core", "headrace.core.main:run", self._start)

    def restart(self) -> None:
        os.kill(self._child.pid, signal.SIGKILL)
        self._child.stop(5)
        self._child = spawn("core", "headrace.core.main:run", self._start)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._child.pid, number)

    def close(self) -> None:
        self._child.stop(5)


@pytest.fixture
def max_replays() -> int:
    """Losses that follow each other closely are nobody's fault."""
    return 100


@pytest.fixture
def standalone(oracle_args: Args, max_replays: int) -> Iterator[tuple[Standalone, int]]:
    """The core, and the port that it listens on."""
    port = free_port()
    core = Standalone(oracle_args(max_replays=max_replays), f"tcp://127.0.0.1:{port}")
    yield core, port
    core.close()


async def connected(port: int) -> AsyncLLM:
    """A frontend of the core there, as soon as it listens."""
    while True:
        try:
            return AsyncLLM(AsyncEngineArgs(engine_core_address=f"tcp://127.0.0.1:{port}"))
        except ConfigError:
            await asyncio.sleep(0.05)


def test_frontends_follow_a_core_that_its_manager_restarts(standalone: tuple[Standalone, int]) -> None:
    core, port = standalone

    async def main() -> None:
        engines = [await connected(port) for _ in range(2)]
        tasks = [
            asyncio.create_task(stream(engine, number, 1500)) for engine in engines for number in range(16)
        ]
        for _ in range(2):
            await asyncio.sleep(0.1)
            await asyncio.to_thread(core.restart)
            await until(lambda: not any(engine._client.trouble for engine in engines))
        for index, tokens in enumerate(await asyncio.gather(*tasks)):
            assert tokens == right(index % 16, 1500)
        for engine in engines:
            engine.shutdown()

    asyncio.run(asyncio.wait_for(main(), 250))


def test_an_attached_core_that_is_stopped_goes_on(standalone: tuple[Standalone, int]) -> None:
    core, port = standalone

    async def main() -> None:
        engine = await connected(port)
        tasks = [asyncio.create_task(stream(engine, number, 1500)) for number in range(8)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        core.signal(signal.SIGSTOP)
        await first_trouble(engine)
        assert time.monotonic() - began < 10
        core.signal(signal.SIGCONT)
        for number, tokens in enumerate(await asyncio.gather(*tasks)):
            assert tokens == right(number, 1500)
        await engine.check_health()
        engine.shutdown()

    asyncio.run(asyncio.wait_for(main(), 250))


@pytest.mark.parametrize("max_replays", [0])  # whoever is blamed ends
def test_a_network_that_blinks_loses_and_doubles_nothing(standalone: tuple[Standalone, int]) -> None:
    _, port = standalone
    pipes: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pipes.append(writer)
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, far_writer), carry(far_reader, writer))

    async def main() -> None:
        direct = await connected(port)  # the core is there
        server = await asyncio.start_server(proxy, "127.0.0.1", 0)
        address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        engine = await asyncio.to_thread(AsyncLLM, AsyncEngineArgs(engine_core_address=address))
        tasks = [asyncio.create_task(stream(engine, number, 1500)) for number in range(16)]
        for pause in (0.05, 0.05, 0.05, 0, 0, 0, 0, 0, 0):
            await asyncio.sleep(pause)
            for pipe in pipes:
                pipe.transport.abort()
            pipes.clear()
            await until(lambda: engine._client.trouble != "" or all(task.done() for task in tasks))
            await until(lambda: engine._client.trouble == "")
        for number, tokens in enumerate(await asyncio.gather(*tasks)):
            assert tokens == right(number, 1500)
        assert engine._client.num_restarts > 0
        stats = (await direct._client.call("stats")).stats
        assert stats is not None
        assert stats.num_free_blocks == stats.num_blocks
        engine.shutdown()
        direct.shutdown()
        server.close()
        await until(lambda: all(pipe.transport.is_closing() for pipe in pipes))

    asyncio.run(asyncio.wait_for(main(), 250))
