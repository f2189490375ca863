"""Pauses, sleep, commands and profiles, from the frontend to the workers and back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from headrace import (
    LLM,
    AsyncEngineArgs,
    AsyncLLM,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from headrace.ipc.oracle import oracle_stream

Args = Callable[..., AsyncEngineArgs]
Result = TypeVar("Result")
LENGTH = 1200


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 250))


def params(max_tokens: int = LENGTH, **changes: Any) -> SamplingParams:
    defaults: dict[str, Any] = {"seed": 3, "ignore_eos": True, "output_kind": RequestOutputKind.FINAL_ONLY}
    return SamplingParams(max_tokens=max_tokens, **(defaults | changes))


async def last(stream: Any) -> RequestOutput:
    outputs: list[RequestOutput] = [output async for output in stream]
    return outputs[-1]


async def running(engine: AsyncLLM, count: int = 3) -> list[asyncio.Task[RequestOutput]]:
    """Requests that have begun to run."""
    tasks = [
        asyncio.create_task(last(engine.generate([i, 1], params(), f"r{i}-{id(engine)}")))
        for i in range(count)
    ]
    while (await engine.get_stats())[0].num_running < count:
        pass
    return tasks


async def check_all(tasks: list[asyncio.Task[RequestOutput]]) -> None:
    for i, output in enumerate(await asyncio.gather(*tasks)):
        assert output.outputs[0].token_ids == oracle_stream([i, 1], 3, LENGTH, 1000)
        assert output.outputs[0].finish_reason == "length"


async def check_still(engine: AsyncLLM) -> None:
    steps = (await engine.get_stats())[0].num_steps
    newcomer = asyncio.create_task(last(engine.generate([7], params(4))))
    await asyncio.sleep(0.1)
    assert (await engine.get_stats())[0].num_steps == steps
    assert not newcomer.done()
    newcomer.cancel()
    await asyncio.wait([newcomer])


@pytest.mark.parametrize("clear_cache", [True, False])
def test_keep_freezes_streams_and_thaws_them(engine: AsyncLLM, clear_cache: bool) -> None:
    async def main() -> None:
        tasks = await running(engine)
        await engine.pause_generation(mode="keep", clear_cache=clear_cache)
        assert await engine.is_paused()
        await check_still(engine)
        stats = (await engine.get_stats())[0]
        assert (stats.num_free_blocks == stats.num_blocks) == clear_cache
        await engine.resume_generation()
        assert not await engine.is_paused()
        await check_all(tasks)

    run(main())


@pytest.mark.parametrize("arguments", [{"mode": "wait"}, {"wait_for_inflight_requests": True}])
def test_wait_lets_streams_end(engine: AsyncLLM, arguments: dict[str, Any]) -> None:
    async def main() -> None:
        tasks = await running(engine)
        await engine.pause_generation(**arguments)
        assert (await engine.get_stats())[0].num_running == 0
        await check_all(tasks)
        await check_still(engine)
        await engine.resume_generation()
        await check_all(await running(engine))

    run(main())


def test_abort_ends_streams_with_what_they_have(engine: AsyncLLM) -> None:
    async def main() -> None:
        tasks = await running(engine)
        await engine.pause_generation()
        for i, output in enumerate(await asyncio.gather(*tasks)):
            tokens = output.outputs[0].token_ids
            assert output.outputs[0].finish_reason == "abort"
            assert tokens == oracle_stream([i, 1], 3, len(tokens), 1000)
        assert engine.num_unfinished_requests == 0
        late = asyncio.create_task(last(engine.generate([0, 1], params())))
        await asyncio.sleep(0.05)
        assert not late.done()
        await engine.resume_generation()
        await check_all([late])

    run(main())


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_sleep_and_wake_up(engine: AsyncLLM, level: int, mode: Any) -> None:
    async def main() -> None:
        tasks = await running(engine)
        await engine.sleep(level, mode)
        await engine.sleep(level, mode)
        assert await engine.is_sleeping()
        await check_still(engine)
        held = (await engine.collective_rpc("memory_stats"))[0]["kv_cache_bytes"]
        assert (held == 0) == (level > 0)
        await engine.wake_up()
        assert not await engine.is_sleeping()
        assert not await engine.is_paused()
        if mode == "abort":
            assert all(o.outputs[0].finish_reason == "abort" for o in await asyncio.gather(*tasks))
        else:
            await check_all(tasks)
        await check_all(await running(engine, 1))

    run(main())


def test_waking_part_by_part(engine: AsyncLLM) -> None:
    async def main() -> None:
        await engine.sleep(1)
        with pytest.raises(RequestError, match="wake_up first"):
            await engine.resume_generation()
        with pytest.raises(RequestError, match="weights have to be awake"):
            await engine.wake_up(["kv_cache"])
        await engine.wake_up(["weights"])
        assert await engine.is_sleeping()
        await check_still(engine)
        await engine.wake_up(["kv_cache"])
        assert not await engine.is_sleeping()
        await check_all(await running(engine, 1))
        await engine.wake_up()
        with pytest.raises(RequestError, match="tags must be one of 'weights', 'kv_cache', 'scheduling'"):
            await engine.wake_up(["weigths"])

    run(main())


def test_resetting_the_prefix_cache(engine: AsyncLLM) -> None:
    async def main() -> None:
        tasks = await running(engine)
        assert not await engine.reset_prefix_cache()
        assert await engine.reset_prefix_cache(reset_running_requests=True)
        await check_all(tasks)
        assert await engine.reset_prefix_cache()

    run(main())


def test_the_workers_can_be_asked_what_is_on_the_list(engine: AsyncLLM) -> None:
    async def main() -> None:
        (answer,) = await engine.collective_rpc("rank")
        assert (answer["rank"], answer["size"], answer["device"]) == (0, 1, "cpu")
        for method in ("exec", "load_model", "__class__", ""):
            with pytest.raises(RequestError, match="'memory_stats', 'rank', 'weights_checksum'"):
                await engine.collective_rpc(method)
        with pytest.raises(RequestError, match="takes no arguments"):
            await engine.collective_rpc("rank", args=(1,))
        with pytest.raises(RequestError, match="oracle has no weights"):
            await engine.collective_rpc("weights_checksum")
        with pytest.raises(RequestError, match="torch_profiler_dir"):
            await engine.start_profile()

    run(main())


@pytest.mark.parametrize(
    "name",
    [
        "add_lora",
        "remove_lora",
        "pin_lora",
        "scale_elastic_ep",
        "init_weight_transfer_engine",
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
        "finish_weight_update",
        "notify_kv_transfer_request_rejected",
    ],
)
def test_what_does_not_exist_is_refused(engine: AsyncLLM, name: str) -> None:
    async def main() -> None:
        with pytest.raises(RequestError, match=f"{name} is not supported: ") as caught:
            await getattr(engine, name)("anything", more=1)
        assert caught.value.parameter == name
        with pytest.raises(RequestError, match="encode is not supported: "):
            await anext(engine.encode("anything", None, "request-1"))
        assert await engine.list_loras() == set()
        assert await engine.get_supported_tasks() == ("generate",)

    run(main())


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda engine: engine.sleep(3), "level"),
        (lambda engine: engine.sleep(True), "level"),
        (lambda engine: engine.sleep(1, "stop"), "mode"),
        (lambda engine: engine.pause_generation(mode="stop"), "mode"),
        (lambda engine: engine.pause_generation(clear_cache=1), "clear_cache"),
        (lambda engine: engine.reset_prefix_cache("yes"), "reset_running_requests"),
        (lambda engine: engine.start_profile(3), "profile_prefix"),
        (lambda engine: engine.start_profile("../x"), "profile_prefix"),
        (lambda engine: engine._client.call("exec"), "method"),
        (lambda engine: engine._client.call("sleep", arguments={"level": 9}), "arguments"),
        (lambda engine: engine._client.call("sleep", arguments={"depth": 1}), "arguments"),
        (lambda engine: engine._client.call("collective_rpc"), "arguments"),
    ],
)
def test_bad_calls_are_refused_and_disturb_nobody(
    engine: AsyncLLM, call: Callable[[AsyncLLM], Coroutine[Any, Any, None]], parameter: str
) -> None:
    async def main() -> None:
        with pytest.raises(RequestError) as caught:
            await call(engine)
        assert caught.value.parameter == parameter
        output = await last(engine.generate([1], params(3)))
        assert output.outputs[0].token_ids == oracle_stream([1], 3, 3, 1000)

    run(main())


def test_every_rank_takes_part(oracle_args: Args) -> None:
    async def main() -> None:
        async with AsyncLLM(oracle_args(tensor_parallel_size=2)) as engine:
            assert [answer["rank"] for answer in await engine.collective_rpc("rank")] == [0, 1]
            tasks = await running(engine)
            await engine.sleep(2, "keep")
            assert [held["kv_cache_bytes"] for held in await engine.collective_rpc("memory_stats")] == [0, 0]
            await engine.wake_up()
            await check_all(tasks)

    run(main())


def test_workers_that_die_in_their_sleep_come_back_and_are_woken(oracle_args: Args) -> None:
    async def main() -> None:
        async with AsyncLLM(oracle_args()) as engine:
            tasks = await running(engine)
            await engine.sleep(1, "keep")
            (answer,) = await engine.collective_rpc("rank")
            os.kill(int(str(answer["pid"])), signal.SIGKILL)
            while not (await engine.get_stats())[0].num_restarts:
                pass
            assert await engine.is_sleeping()
            (again,) = await engine.collective_rpc("rank")
            assert again["pid"] != answer["pid"]
            await engine.wake_up()
            await check_all(tasks)

    run(main())


@pytest.mark.parametrize(
    "name",
    [
        "apply_model",
        "encode",
        "embed",
        "classify",
        "reward",
        "score",
        "init_weight_transfer_engine",
        "start_weight_update",
        "start_draft_weight_update",
        "update_weights",
        "finish_weight_update",
    ],
)
def test_what_llm_does_not_have_is_refused(name: str) -> None:
    llm = LLM.__new__(LLM)  # it needs no engine to say so
    with pytest.raises(RequestError, match=f"{name} is not supported: "):
        getattr(llm, name)("anything", more=1)


# --- with weights -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A very small Llama on this machine's CPU."""
    folder = tmp_path_factory.mktemp("llama")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    llm = LLM(
        str(folder),
        load_format="dummy",
        dtype="float32",
        skip_tokenizer_init=True,
        num_gpu_blocks_override=64,
        poison_blocks=True,
        torch_profiler_dir=str(folder / "traces"),
    )
    yield llm
    llm.shutdown()


def answers(llm: LLM) -> list[list[int]]:
    prompts = [[3, 4, 5], [9] * 20]
    greedy = params(12, temperature=0, seed=None)
    return [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 2])
def test_a_model_says_the_same_after_its_sleep(model: LLM, level: int) -> None:
    before = answers(model)
    assert model.get_world_size() == 1
    (checksum,) = model.collective_rpc("weights_checksum")
    (awake,) = model.collective_rpc("memory_stats")
    model.sleep(level)
    (asleep,) = model.collective_rpc("memory_stats")
    assert awake["kv_cache_bytes"]
    assert asleep["kv_cache_bytes"] == 0
    assert asleep["weights_bytes"] == (awake["weights_bytes"] if level == 1 else 0)
    with pytest.raises(RequestError, match="wake_up first"):
        model.collective_rpc("weights_checksum")
    model.wake_up()
    assert model.collective_rpc("weights_checksum") == [checksum]
    assert model.collective_rpc("memory_stats") == [awake]
    assert answers(model) == before


@pytest.mark.slow
def test_profiles(model: LLM) -> None:
    with pytest.raises(RequestError, match="no profile"):
        model.stop_profile()
    model.start_profile("run-1")
    with pytest.raises(RequestError, match="already"):
        model.start_profile()
    answers(model)
    (path,) = model.stop_profile()
    assert Path(path).name.startswith("run-1-rank0-")
    events = json.loads(Path(path).read_text())["traceEvents"]
    assert any("mm" in event.get("name", "") for event in events)
