"""AsyncLLM on real processes: every stream is the oracle's, however it is asked for and however it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import psutil
import pytest
import uvloop
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    AsyncLLMEngine,
    EngineDeadError,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from headrace.ipc.messages import Stats
from headrace.ipc.oracle import oracle_stream

VOCAB_SIZE = 1000
DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY
Result = TypeVar("Result")
Args = Callable[..., AsyncEngineArgs]


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """On a fresh event loop, and not for ever."""
    return asyncio.run(asyncio.wait_for(work, 250))


def sampling(seed: int, max_tokens: int = 20, **changes: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"ignore_eos": True, "output_kind": DELTA}
    return SamplingParams(seed=seed, max_tokens=max_tokens, **(defaults | changes))


def oracle(prompt: list[int], seed: int, num_tokens: int = 20) -> list[int]:
    return oracle_stream(prompt, seed, num_tokens, VOCAB_SIZE)


async def tokens(stream: Any) -> list[int]:
    return [token async for output in stream for token in output.outputs[0].token_ids]


async def collect(stream: Any) -> list[RequestOutput]:
    return [output async for output in stream]


async def stats(engine: AsyncLLM) -> Stats:
    found = (await engine._client.call("stats")).stats
    assert found is not None
    return found


async def until(engine: AsyncLLM, done: Callable[[Stats], bool]) -> Stats:
    """The core's state once it is as wanted."""
    while True:
        state = await stats(engine)
        if done(state):
            return state


async def until_idle(engine: AsyncLLM) -> Stats:
    return await until(engine, lambda state: state.num_running + state.num_waiting == 0)


# --- streams ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_many_streams_are_exact(engine: AsyncLLM, runner: Callable[..., Any]) -> None:
    async def main() -> None:
        rng = random.Random(0)
        prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 80))] for _ in range(100)]
        streams = [engine.generate(p, sampling(i, 5 + i % 40), f"s{i}") for i, p in enumerate(prompts)]
        results = await asyncio.gather(*map(tokens, streams))
        for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            assert result == oracle(prompt, i, 5 + i % 40)

    runner(main())


def test_three_kinds(engine: AsyncLLM) -> None:
    async def main() -> None:
        expected = oracle([1, 2, 3], 5)
        cumulative = await collect(engine.generate([1, 2, 3], sampling(5, output_kind=CUMULATIVE), "c"))
        for output in cumulative:
            ids = output.outputs[0].token_ids
            assert ids == expected[: len(ids)]
        (final,) = [
            output async for output in engine.generate([1, 2, 3], sampling(5, output_kind=FINAL), "f")
        ]
        for output in (cumulative[-1], final):
            assert output.finished
            assert output.outputs[0].token_ids == expected
            assert output.outputs[0].finish_reason == "length"
            assert output.prompt_token_ids == [1, 2, 3]
        assert final.num_cached_tokens == 0

    run(main())


def test_every_calling_form(engine: AsyncLLM) -> None:
    async def main() -> None:
        params, expected = sampling(3), oracle([9, 8], 3)
        assert await tokens(engine.generate([9, 8], params, "a")) == expected
        assert await tokens(engine.generate("b", [9, 8], params)) == expected
        keywords = engine.generate(
            request_id="c", prompt={"prompt_token_ids": [9, 8]}, sampling_params=params
        )
        assert await tokens(keywords) == expected
        assert await tokens(engine.generate(prompt=[9, 8], sampling_params=params)) == expected

        await engine.add_request(request_id="d", prompt=[9, 8], sampling_params=params, arrival_time=1.0)
        await engine.add_request("e", [9, 8], params)
        assert await tokens(engine.generate("e")) == expected
        assert await tokens(engine.generate("d")) == expected
        assert await tokens(await engine.add_request("f", [9, 8], params=params)) == expected
        for gone in ("d", "f", "never added"):
            with pytest.raises(RequestError, match="waits to be read"):
                await tokens(engine.generate(gone))

    run(main())


def test_several_completions(engine: AsyncLLM) -> None:
    async def main() -> None:
        (final,) = await collect(engine.generate([1], sampling(40, n=3, output_kind=FINAL), "n"))
        assert [part.index for part in final.outputs] == [0, 1, 2]
        for part in final.outputs:
            assert part.token_ids == oracle([1], 40 + part.index)
        seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
        async for output in engine.generate([1], sampling(40, n=3), "d"):
            for part in output.outputs:
                seen[part.index] += part.token_ids
        assert seen == {i: oracle([1], 40 + i) for i in range(3)}

    run(main())


def test_token_ids_that_end_a_request(engine: AsyncLLM) -> None:
    async def main() -> None:
        stream = oracle([4], 1, 400)
        stop = next(token for token in stream[10:] if token not in stream[:10] and token != 7)
        params = sampling(1, 400, stop_token_ids=[stop], output_kind=FINAL)
        (output,) = await collect(engine.generate([4], params))
        assert output.outputs[0].token_ids == stream[: stream.index(stop) + 1]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)

        seed = next(s for s in range(1000) if 7 in oracle([4], s, 60))
        params = sampling(seed, 60, ignore_eos=False, output_kind=FINAL)
        (output,) = await collect(engine.generate([4], params))
        expected = oracle([4], seed, 60)
        assert output.outputs[0].token_ids == expected[: expected.index(7) + 1]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)

    run(main())


def test_unseeded_requests_differ(engine: AsyncLLM) -> None:
    async def main() -> None:
        params = SamplingParams(max_tokens=8, ignore_eos=True, output_kind=DELTA)
        assert await tokens(engine.generate([1], params)) != await tokens(engine.generate([1], params))

    run(main())


def test_without_a_limit_it_goes_on_to_the_context_length(engine: AsyncLLM) -> None:
    async def main() -> None:
        prompt = list(range(100))
        params = SamplingParams(seed=0, max_tokens=None, ignore_eos=True, output_kind=DELTA)
        assert len(await tokens(engine.generate(prompt, params))) == 2048 - 100

    run(main())


def test_the_default_parameters_are_vllms(engine: AsyncLLM) -> None:
    async def main() -> None:
        outputs = [output async for output in engine.generate(prompt=[1, 2])]
        assert len(outputs[-1].outputs[0].token_ids) <= 16

    run(main())


# --- ends ------------------------------------------------------------------------------------------------


def endless(seed: int) -> SamplingParams:
    return sampling(seed, 1900)


def test_abort_ends_the_reader_and_frees_the_blocks(slow_engine: AsyncLLM) -> None:
    async def main() -> None:
        await slow_engine.reset_prefix_cache()
        free = (await stats(slow_engine)).num_free_blocks
        readers = [
            asyncio.create_task(collect(slow_engine.generate([i + 1], endless(i), f"r{i}"))) for i in range(6)
        ]
        await until(slow_engine, lambda state: state.num_running == 6)
        await slow_engine.abort("r0")
        await slow_engine.abort_request(["r1", "r2", "unknown"])
        await slow_engine.abort(f"r{i}" for i in range(3, 6))
        for i, reader in enumerate(readers):
            outputs = await reader
            assert (outputs[-1].outputs[0].finish_reason, outputs[-1].finished) == ("abort", True)
            got = [token for output in outputs for token in output.outputs[0].token_ids]
            assert got == oracle([i + 1], i, len(got))
        assert slow_engine.num_unfinished_requests == 0
        assert (await until_idle(slow_engine)).num_free_blocks == free

    run(main())


def test_abort_before_it_is_read(slow_engine: AsyncLLM) -> None:
    async def main() -> None:
        await slow_engine.add_request("a", [1], endless(0))
        await slow_engine.abort("a")
        outputs = await collect(slow_engine.generate("a"))
        assert outputs[-1].outputs[0].finish_reason == "abort"

    run(main())


def test_leaving_a_stream_aborts_the_request(slow_engine: AsyncLLM) -> None:
    async def main() -> None:
        task = asyncio.create_task(tokens(slow_engine.generate([1], endless(1), "cancelled")))
        await until(slow_engine, lambda state: state.num_running == 1)
        task.cancel()
        await asyncio.wait([task])

        closed = slow_engine.generate([1], endless(2), "closed")
        await anext(closed)
        await closed.aclose()

        async for _ in slow_engine.generate([1], endless(3), "broken off"):
            break
        gc.collect()

        async with slow_engine.generate([1], endless(4), "context") as stream:
            await anext(stream)

        await until_idle(slow_engine)
        await slow_engine.wait_for_requests_to_drain(10)

    run(main())


def test_a_thousand_requests_left_at_random(engine: AsyncLLM) -> None:
    """Those that are read to their end are exact, the others are gone, and no block is lost."""

    async def main() -> None:
        rng = random.Random(7)
        await engine.reset_prefix_cache()
        free = (await stats(engine)).num_free_blocks

        async def one(seed: int) -> None:
            prompt = [seed % VOCAB_SIZE] * rng.randrange(1, 40)
            length, leave, way = rng.randrange(1, 60), rng.randrange(40), rng.randrange(4)
            stream = engine.generate(prompt, sampling(seed, length), f"x{seed}")
            got: list[int] = []
            async for output in stream:
                got += output.outputs[0].token_ids
                if len(got) > leave and way == 1:
                    break
                if len(got) > leave and way == 2:
                    await engine.abort(f"x{seed}")
                if len(got) > leave and way == 3:
                    await stream.aclose()
            assert got == oracle(prompt, seed, length)[: len(got)]
            assert len(got) == length or way

        async def worker(first: int) -> None:
            for seed in range(first, 1000, 50):
                await one(seed)

        await asyncio.gather(*(worker(first) for first in range(50)))
        await until_idle(engine)
        assert engine.num_unfinished_requests == 0
        await engine.reset_prefix_cache()
        assert (await stats(engine)).num_free_blocks == free

    run(main())


def test_the_loop_may_end_in_the_middle(slow_engine: AsyncLLM) -> None:
    """`asyncio.run` cancels its tasks; the next loop finds a clean engine."""

    async def leave() -> None:
        task = asyncio.create_task(tokens(slow_engine.generate([1], endless(5), "left")))
        await until(slow_engine, lambda state: state.num_running == 1)
        assert not task.done()
        kept.append(slow_engine.generate([2], endless(6), "kept"))
        await anext(kept[0])

    kept: list[Any] = []
    run(leave())
    kept.clear()
    gc.collect()

    async def main() -> None:
        assert await tokens(slow_engine.generate([1], sampling(1), "left")) == oracle([1], 1)
        await until_idle(slow_engine)
        await slow_engine.wait_for_requests_to_drain(5)

    run(main())


def test_a_loop_may_be_closed_under_its_readers(engine: AsyncLLM) -> None:
    """Nothing cancels their tasks then; the next loop finds an engine that works, and their requests end."""
    readers: list[Any] = []

    async def leave() -> None:
        readers.append(asyncio.create_task(tokens(engine.generate([1], endless(5), "left"))))
        readers.append(engine.generate([2], endless(6), "kept"))
        await anext(readers[1])
        await until(engine, lambda state: state.num_running == 2)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(asyncio.wait_for(leave(), 60))
    loop.close()
    readers.pop().abort()  # on no loop at all
    readers.clear()

    async def main() -> None:
        assert await tokens(engine.generate([1], sampling(1), "next")) == oracle([1], 1)
        await until_idle(engine)
        await engine.wait_for_requests_to_drain(5)

    run(main())


def test_a_live_id_cannot_be_used_twice_but_at_once_after(engine: AsyncLLM) -> None:
    async def main() -> None:
        stream = engine.generate([1], endless(0), "twice")
        await anext(stream)
        with pytest.raises(RequestError, match="'twice' is in use"):
            await tokens(engine.generate([1], sampling(0), "twice"))
        await engine.abort("twice")
        for seed in range(5):
            assert await tokens(engine.generate([1], sampling(seed), "twice")) == oracle([1], seed)

    run(main())


def test_bad_requests_fail_alone(engine: AsyncLLM) -> None:
    async def main() -> None:
        pid = engine._client.info.pid
        good = [asyncio.create_task(tokens(engine.generate([i], sampling(i, 200)))) for i in range(32)]
        late = sampling(1)
        late.temperature = float("nan")
        bad: list[tuple[Any, Any, str]] = [
            ([], sampling(0), "empty"),
            ([1] * 2048, sampling(0), "max_model_len=2048"),
            ([VOCAB_SIZE], sampling(0), "vocabulary"),
            ([-1], sampling(0), "vocabulary"),
            ("text", sampling(0), "no tokenizer"),
            ({"prompt_token_ids": [1], "multi_modal_data": {"image": 1}}, sampling(0), "multi_modal_data"),
            (None, sampling(0), "prompt must be"),
            ([1], sampling(0, stop=["x"]), "tokenizer"),
            ([1], late, "temperature"),
            ([1], {"temperature": 1}, "sampling_params"),
        ]
        for prompt, params, names in bad:
            with pytest.raises(RequestError, match=names):
                await tokens(engine.generate(prompt=prompt, sampling_params=params))
        with pytest.raises(RequestError, match="scheduling_policy"):
            await tokens(engine.generate(prompt=[1], sampling_params=sampling(0), priority=1))
        with pytest.raises(RequestError, match="lora_request"):
            await tokens(engine.generate([1], sampling(0), "x", lora_request=object()))
        for i, task in enumerate(good):
            assert await task == oracle([i], i, 200)
        assert engine.num_unfinished_requests == 0
        assert (await stats(engine)).num_restarts == 0
        assert (engine._client.info.pid, engine._client.num_restarts) == (pid, 0)

    run(main())


def test_a_slow_reader_gets_one_merged_delta(engine: AsyncLLM) -> None:
    async def main() -> None:
        slow = engine.generate([5], sampling(5, 300), "slow")
        first = await anext(slow)
        for seed in range(3):
            assert await tokens(engine.generate([6], sampling(seed, 300))) == oracle([6], seed, 300)
        second = await anext(slow)
        assert second.finished
        assert first.outputs[0].token_ids + second.outputs[0].token_ids == oracle([5], 5, 300)

    run(main())


# --- the engine ------------------------------------------------------------------------------------------


def test_its_state(engine: AsyncLLM) -> None:
    async def main() -> None:
        await engine.check_health()
        await engine.do_log_stats()
        assert engine.is_running
        assert not engine.is_stopped
        assert not engine.errored
        assert engine.dead_error is None
        assert engine.tokenizer is None
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            engine.get_tokenizer()
        assert not await engine.is_tracing_enabled()
        assert AsyncLLMEngine is AsyncLLM

    run(main())


def test_prefix_cache(engine: AsyncLLM) -> None:
    async def cached() -> int | None:
        outputs = await collect(engine.generate(list(range(100)), sampling(0, 4)))
        return outputs[-1].num_cached_tokens

    async def main() -> None:
        await until_idle(engine)
        assert await engine.reset_prefix_cache()
        assert [await cached(), await cached()] == [0, 96]
        assert await engine.reset_prefix_cache()
        assert await cached() == 0

    run(main())


def test_two_engines_and_priorities(engine: AsyncLLM, oracle_args: Args) -> None:
    async def main() -> None:
        async with AsyncLLM(oracle_args(scheduling_policy="priority")) as other:
            pairs = [
                asyncio.gather(
                    tokens(engine.generate([i], sampling(i), f"{i}")),
                    tokens(other.generate([i], sampling(i), f"{i}", priority=i)),
                )
                for i in range(10)
            ]
            for i, pair in enumerate(pairs):
                one, two = await pair
                assert one == two == oracle([i], i)
        assert not other.errored
        assert other.is_stopped
        with pytest.raises(EngineDeadError, match="shut down"):
            await tokens(other.generate([1], sampling(1)))
        other.shutdown()
        await engine.check_health()

    run(main())


def test_a_busy_loop_keeps_its_engine(engine: AsyncLLM) -> None:
    async def main() -> None:
        stream = engine.generate([1], endless(0))
        await anext(stream)

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="another event loop"):
                asyncio.run(tokens(engine.generate([1], sampling(0))))

        await asyncio.to_thread(elsewhere)
        await stream.aclose()

    run(main())


def test_death_reaches_every_reader(oracle_args: Args) -> None:
    """The core is killed, and so is each that is to replace it."""

    async def main() -> None:
        engine = AsyncLLM(oracle_args())
        streams = [engine.generate([i], endless(i)) for i in range(4)]
        for stream in streams:
            await anext(stream)
        first = engine._client.info.pid
        family = psutil.Process(first).children(recursive=True)
        killed: list[int] = []
        while engine.dead_error is None:
            core = engine._client._connection.core
            if core is not None and core.pid not in killed:
                killed.append(core.pid)
                family.append(psutil.Process(core.pid))
                os.kill(core.pid, signal.SIGKILL)
            await asyncio.sleep(0)
        assert len(killed) == 4
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await tokens(stream)
        with pytest.raises(EngineDeadError):
            await engine.check_health()
        assert engine.errored
        assert f"(pid {first}) was killed by SIGKILL" in str(engine.dead_error)
        with pytest.raises(EngineDeadError):
            await tokens(engine.generate([1], sampling(1)))
        engine.shutdown()
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive

    run(main())
