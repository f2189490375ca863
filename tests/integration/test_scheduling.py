"""Order, limits and timeouts through the real engine: each stream is the oracle's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from headrace import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    OverloadedError,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    RequestTimeouts,
    SamplingParams,
)
from headrace.ipc.oracle import oracle_stream

from .hasty_core import AGEING_SECONDS

Args = Callable[..., AsyncEngineArgs]
Result = TypeVar("Result")


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 250))


def params(max_tokens: int, seed: int = 1) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens, seed=seed, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )


def oracle(prompt: list[int], num_tokens: int, seed: int = 1) -> list[int]:
    return oracle_stream(prompt, seed, num_tokens, 1000)


async def last(stream: Any) -> RequestOutput:
    outputs: list[RequestOutput] = [output async for output in stream]
    return outputs[-1]


async def until_counted(engine: AsyncLLM, num_waiting: int, num_running: int = 0) -> None:
    """So many have reached the core, and are in line or run."""
    while True:
        stats, _ = await engine.get_stats()
        if stats.num_waiting >= num_waiting and stats.num_running >= num_running:
            return


def test_a_crowd_of_one_client_does_not_delay_another(oracle_args: Args) -> None:
    """One slot and 300 requests in line: the other client's only one is the next or the one after it."""

    async def main(crowd: AsyncLLM, single: AsyncLLM) -> None:
        finished: list[str] = []

        async def one(engine: AsyncLLM, name: str, seed: int) -> None:
            output = await last(engine.generate([1, 2, seed], params(30, seed), name))
            assert output.outputs[0].token_ids == oracle([1, 2, seed], 30, seed)
            finished.append(name)

        tasks = [asyncio.create_task(one(crowd, f"crowd-{i}", i)) for i in range(300)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        before = len(finished)
        await one(single, "single", 500)
        assert finished.index("single") - before < 150
        await asyncio.gather(*tasks)

    with AsyncLLMs(oracle_args(max_num_seqs=1)) as (crowd, single):
        run(main(crowd, single))


class AsyncLLMs:
    """An embedded engine and a second client of its core."""

    def __init__(self, args: AsyncEngineArgs) -> None:
        self._engines = [AsyncLLM(args)]
        core = self._engines[0]._client._connection.core
        assert core is not None
        self._engines.append(AsyncLLM(AsyncEngineArgs(engine_core_address=core.address)))

    def __enter__(self) -> tuple[AsyncLLM, AsyncLLM]:
        return self._engines[0], self._engines[1]

    def __exit__(self, *_: object) -> None:
        for engine in reversed(self._engines):
            engine.shutdown()


def test_an_urgent_arrival_overtakes_those_that_run(oracle_args: Args) -> None:
    async def main() -> None:
        async with AsyncLLM(
            oracle_args(max_num_seqs=2, scheduling_policy="priority", hang_seconds=100)
        ) as engine:
            (worker,) = psutil.Process(engine._client.info.pid).children()
            ended: list[str] = []

            async def one(name: str, seed: int, count: int, priority: int) -> None:
                output = await last(engine.generate([seed], params(count), name, priority=priority))
                assert output.outputs[0].token_ids == oracle([seed], count)
                ended.append(name)

            await engine.pause_generation(mode="keep")
            tasks = [asyncio.create_task(one(f"slow-{i}", i, 1500, 5)) for i in range(4)]
            await until_counted(engine, 4)
            worker.suspend()  # two run, and do not end before the urgent one is there
            await engine.resume_generation()
            await until_counted(engine, 2, num_running=2)
            tasks.append(asyncio.create_task(one("urgent", 9, 3, -1)))
            await until_counted(engine, 3)
            worker.resume()
            await asyncio.gather(*tasks)
            assert ended[0] == "urgent"
            assert (await engine.get_stats())[0].num_preemptions == 1

    run(main())


def test_the_oldest_is_not_starved_by_the_urgent(
    oracle_args: Args, embed_other: Callable[[str], None]
) -> None:
    """It has waited long: one of eight places is its own, though all others are more urgent."""
    embed_other("hasty_core")

    async def main() -> None:
        async with AsyncLLM(oracle_args(max_num_seqs=1, scheduling_policy="priority")) as engine:
            await engine.pause_generation(mode="keep")
            ended: list[str] = []

            async def one(name: str, seed: int, priority: int) -> None:
                output = await last(engine.generate([seed], params(5, seed), name, priority=priority))
                assert output.outputs[0].token_ids == oracle([seed], 5, seed)
                ended.append(name)

            tasks = [asyncio.create_task(one("old", 1, 9))]
            await until_counted(engine, 1)
            await asyncio.sleep(AGEING_SECONDS)
            tasks += [asyncio.create_task(one(f"urgent-{seed}", seed, -9)) for seed in range(2, 40)]
            await until_counted(engine, 39)
            await engine.resume_generation()
            await asyncio.gather(*tasks)
            assert ended.index("old") == 7

    run(main())


def test_a_cached_prefix_goes_first_when_it_would_be_evicted(oracle_args: Args) -> None:
    stem = list(range(200, 328))
    others = [[number, *range(400, 640)] for number in (1, 2)]

    async def main() -> None:
        args = oracle_args(max_num_seqs=1, num_gpu_blocks_override=20, max_model_len=300)
        async with AsyncLLM(args) as engine:
            await last(engine.generate(stem, params(2)))
            await engine.pause_generation(mode="keep", clear_cache=False)
            ended: list[int] = []

            async def one(number: int, prompt: list[int]) -> RequestOutput:
                output = await last(engine.generate(prompt, params(3)))
                assert output.outputs[0].token_ids == oracle(prompt, 3)
                ended.append(number)
                return output

            tasks = [asyncio.create_task(one(number, prompt)) for number, prompt in enumerate(others)]
            tasks.append(asyncio.create_task(one(2, [*stem, 7])))
            await until_counted(engine, 3)
            await engine.resume_generation()
            outputs = await asyncio.gather(*tasks)
            assert ended == [2, 0, 1]
            assert outputs[2].num_cached_tokens == 128

    run(main())


@pytest.mark.parametrize("timeout", [0, 2, RequestTimeouts(total=2)])
def test_a_timeout_ends_what_runs(slow_engine: AsyncLLM, timeout: float | RequestTimeouts) -> None:
    """All end in time, with all that had been generated."""

    async def main() -> None:
        begun = time.monotonic()
        streams = [slow_engine.generate([5, i], params(2000), timeout=timeout) for i in range(100)]
        outputs = await asyncio.gather(*map(last, streams))
        assert time.monotonic() - begun < 30
        for i, output in enumerate(outputs):
            tokens = output.outputs[0].token_ids
            assert output.finished
            assert output.outputs[0].finish_reason == "timeout"
            assert tokens == oracle([5, i], len(tokens))
        assert any(output.outputs[0].token_ids for output in outputs) == (timeout != 0)

    run(main())


@pytest.mark.parametrize("timeout", [RequestTimeouts(queue=0.1), RequestTimeouts(first_token=0.1)])
def test_a_timeout_ends_what_waits(oracle_args: Args, timeout: RequestTimeouts) -> None:
    async def main() -> None:
        async with AsyncLLM(oracle_args(max_num_seqs=1)) as engine:
            await engine.pause_generation(mode="keep")  # nothing happens that would wake the core
            running = asyncio.create_task(last(engine.generate([1], params(20))))
            output = await last(engine.generate([2], params(20), timeout=timeout))
            assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("timeout", [])
            await engine.resume_generation()
            assert (await running).outputs[0].token_ids == oracle([1], 20)

    run(main())


def test_timeouts_of_a_batch(oracle_folder: Path) -> None:
    with LLM(str(oracle_folder), load_format="oracle", skip_tokenizer_init=True, max_num_seqs=1) as llm:
        outputs = llm.generate([[1], [2]], params(10), timeout=0, use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["timeout", "timeout"]
        outputs = llm.generate([[1], [2]], params(10), timeout=RequestTimeouts(total=50), use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == [oracle([1], 10), oracle([2], 10)]


def test_no_timeout_strikes_what_is_in_time(engine: AsyncLLM) -> None:
    async def main() -> None:
        limits = RequestTimeouts(queue=50, first_token=50, total=50)
        output = await last(engine.generate([5], params(20), "in time", timeout=limits))
        assert (output.outputs[0].finish_reason, len(output.outputs[0].token_ids)) == ("length", 20)

    run(main())


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "3", True, 1e10])
def test_bad_timeouts_are_refused(engine: AsyncLLM, timeout: Any) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match="timeout must be") as caught:
            await last(engine.generate([5], params(2), timeout=timeout))
        assert caught.value.parameter == "timeout"
        with pytest.raises(RequestError, match="first_token must be"):
            RequestTimeouts(first_token=timeout)

    run(main())


def test_a_full_queue_refuses_and_recovers(oracle_args: Args) -> None:
    async def main() -> None:
        async with AsyncLLM(oracle_args(max_num_seqs=1, max_queued_requests=3)) as engine:
            streams = [await engine.add_request(None, [i], params(500)) for i in range(10)]
            results = await asyncio.gather(*map(last, streams), return_exceptions=True)
            refused = [result for result in results if isinstance(result, BaseException)]
            assert len(refused) == 6
            for error in refused:
                assert isinstance(error, OverloadedError)
                assert (error.parameter, error.limit) == ("max_queued_requests", "3")
                assert error.retry_after >= 1
            for i, result in enumerate(results):
                if isinstance(result, RequestOutput):
                    assert result.outputs[0].token_ids == oracle([i], 500)
            again = await last(engine.generate([7], params(5)))
            assert again.outputs[0].token_ids == oracle([7], 5)

    run(main())


def test_salts_keep_prefixes_apart(engine: AsyncLLM) -> None:
    async def main() -> None:
        ids = list(range(100, 164))
        found = []
        for salt in ("a", "a", "b", None):
            prompt = {"prompt_token_ids": ids, "cache_salt": salt}
            output = await last(engine.generate(prompt, params(3)))
            assert output.outputs[0].token_ids == oracle(ids, 3)
            found.append(output.num_cached_tokens)
        assert found == [0, 48, 0, 0]

    run(main())
