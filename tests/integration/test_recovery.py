"""Faults under load: every stream that was accepted goes on, exact to the token."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest
from headrace import AsyncEngineArgs, AsyncLLM, RequestCrashedError, RequestOutputKind, SamplingParams
from headrace.ipc.oracle import oracle_stream

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


def workers(engine: AsyncLLM) -> list[psutil.Process]:
    children: list[psutil.Process] = psutil.Process(engine._client.info.pid).children()
    return children


async def stream(
    engine: AsyncLLM, number: int, max_tokens: int, prompt: list[int] | None = None
) -> list[int]:
    """The tokens of one request, delta by delta."""
    params = SamplingParams(
        max_tokens=max_tokens, seed=number, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    tokens: list[int] = []
    async for output in engine.generate(prompt or [number, 1, 2, 3], params, str(number)):
        tokens += output.outputs[0].token_ids
    return tokens


def right(number: int, max_tokens: int) -> list[int]:
    return oracle_stream([number, 1, 2, 3], number, max_tokens, VOCAB_SIZE)


async def wait_for_restart(engine: AsyncLLM, number: int) -> None:
    while True:
        stats = (await engine._client.call("stats", 20)).stats
        assert stats is not None
        if stats.num_restarts >= number and workers(engine):
            return


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_streams_go_on_when_workers_are_killed(small: AsyncLLM, how: signal.Signals) -> None:
    choose = random.Random(int(how))
    crowd = range(64)

    async def main() -> None:
        tasks = [asyncio.create_task(stream(small, number, 1500)) for number in crowd]
        for restart in range(1, 4):
            # Somewhere in the prefills, in the middle, or while the last restart is being replayed.
            await asyncio.sleep(choose.choice([0.005, 0.1, 0.3]))
            choose.choice(workers(small)).send_signal(how)
            await wait_for_restart(small, restart)
            while (await small._client.call("ping")).unhealthy:
                pass
        for number, tokens in zip(crowd, await asyncio.gather(*tasks), strict=True):
            assert tokens == right(number, 1500)

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize("fault", ["raise", "exit", "garbage"])
def test_a_poison_request_ends_alone(oracle_args: Args, fault: str) -> None:
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

    engine = AsyncLLM(oracle_args())
    asyncio.run(asyncio.wait_for(main(engine), 120))
    engine.shutdown()
