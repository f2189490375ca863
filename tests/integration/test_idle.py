"""At rest nothing burns, and after any number of aborts nothing is left."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from headrace import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams

Args = Callable[..., AsyncEngineArgs]


def cpu_seconds(processes: list[psutil.Process]) -> list[float]:
    return [sum(process.cpu_times()[:2]) for process in processes]


def test_idle_is_idle(oracle_args: Args) -> None:
    """Under 2 % of a CPU in every process over 10 s, while an event loop runs and while none does."""

    async def rest() -> None:
        async for _ in engine.generate([1], SamplingParams(max_tokens=5)):
            pass
        await measure(8.0)

    async def measure(seconds: float) -> None:
        processes = [psutil.Process(), *psutil.Process(engine._client.info.pid).children(), core]
        before, began = cpu_seconds(processes), time.monotonic()
        await asyncio.sleep(seconds)
        elapsed = time.monotonic() - began
        used = [after - first for after, first in zip(cpu_seconds(processes), before, strict=True)]
        assert max(used) / elapsed < 0.02, used

    engine = AsyncLLM(oracle_args(tensor_parallel_size=2))
    core = psutil.Process(engine._client.info.pid)
    asyncio.run(rest())
    asyncio.run(measure(2.0))
    engine.shutdown()


def waits(pid: int) -> list[str]:
    """What in the kernel each thread of a process waits in."""
    return [(task / "wchan").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]


def test_the_first_token_after_idling_waits_for_no_clock(engine: AsyncLLM) -> None:
    """At rest every thread waits for news, none for a time to pass; and then a token is there at once."""

    async def first_token() -> float:
        began = time.monotonic()
        await anext(engine.generate([1], SamplingParams(max_tokens=1, ignore_eos=True)))
        return time.monotonic() - began

    async def main() -> None:
        await first_token()
        core = psutil.Process(engine._client.info.pid)
        seconds = []
        for _ in range(10):
            for _ in range(10):
                await asyncio.sleep(0.03)
                found = [wait for each in (core, *core.children()) for wait in waits(each.pid)]
                assert not [wait for wait in found if "sleep" in wait], found
            seconds.append(await first_token())
        # 2 ms. An interval at which anybody looked for news would be seen here, half of it on average.
        assert statistics.median(seconds) < 0.1, seconds

    asyncio.run(main())


def test_ten_thousand_aborts_at_random_moments(oracle_args: Args) -> None:
    """In the queue, in the prefill, while decoding, at the end: every reader ends, every block comes back."""
    choose = random.Random(0)

    async def one(engine: AsyncLLM, number: int) -> None:
        params = SamplingParams(
            max_tokens=choose.randint(1, 40), ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        prompt = [choose.randrange(900) for _ in range(choose.randint(1, 300))]
        reader = asyncio.create_task(read(engine, prompt, params, str(number)))
        for _ in range(choose.randrange(30)):
            await asyncio.sleep(0)
        if choose.random() < 0.5:
            await engine.abort(str(number))
        else:
            reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)

    async def read(engine: AsyncLLM, prompt: list[int], params: SamplingParams, name: str) -> None:
        async for _ in engine.generate(prompt, params, name):
            pass

    async def main(engine: AsyncLLM) -> None:
        for start in range(0, 10_000, 200):
            await asyncio.gather(*(one(engine, start + i) for i in range(200)))
        assert engine.num_unfinished_requests == 0
        stats, _ = await engine.get_stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert stats.num_free_blocks == stats.num_blocks
        assert (engine._client.num_restarts, stats.num_restarts) == (0, 0)

    engine = AsyncLLM(oracle_args(num_gpu_blocks_override=200))
    asyncio.run(asyncio.wait_for(main(engine), 250))
    engine.shutdown()
