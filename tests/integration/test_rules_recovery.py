"""Whatever a request asks of its tokens, it gets the same ones when it is preempted and its engine is killed.

A small model on a CPU, batch_invariant, so that alone and in the storm are the same bits.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psutil
import pytest
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from headrace.frontend.repetition import RepetitionDetectionParams

from tests.integration.tiny_llama import save_with_tokenizer, tiny_llama

LETTERS = list(range(64, 72))
"""Token ids of single characters."""
THINK, END_THINK = 258, 259
LONG = 160
ASKED: dict[str, tuple[list[int], dict[str, Any]]] = {
    "thinking budget": ([THINK, 5], {"thinking_token_budget": 90, "logit_bias": {END_THINK: -1000.0}}),
    "repetition": (
        [1, 2],
        {
            "allowed_token_ids": LETTERS[:3],
            "min_tokens": 60,
            "repetition_detection": RepetitionDetectionParams(3, 1, 4),
        },
    ),
    "bad words": ([1, 3], {"allowed_token_ids": LETTERS, "bad_words": ["`a", "ab", "bcd", "c"]}),
    "min tokens": (
        [1, 4],
        {"allowed_token_ids": LETTERS, "min_tokens": 120, "stop_token_ids": LETTERS[:3], "seed": 4},
    ),
    "bias and penalties": (
        [1, 5],
        {
            "logit_bias": {7: 3.0, 9: -3.0},
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.3,
        },
    ),
    "stop string": ([1, 6], {"allowed_token_ids": LETTERS[:3], "stop": ["abc", "cb"], "min_tokens": 100}),
    "regular expression": (
        [1, 7],
        {"structured_outputs": StructuredOutputsParams(regex="([a-z]{2,9} ){9,20}"), "min_p": 0.01},
    ),
    "several": ([1, 8] * 9, {"n": 3, "logprobs": 2, "prompt_logprobs": 1}),
    "greedy": ([1, 9], {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 0}),
    "filters": ([1, 10], {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5}),
    "given tokens": ([1, 11], {"logprob_token_ids": [3, 260], "flat_logprobs": True}),
    "no prefix cache": ([1, 8] * 9, {"skip_reading_prefix_cache": True, "skip_special_tokens": False}),
}


class Seen(NamedTuple):
    """All that a reader saw of one completion."""

    text: str
    token_ids: list[int]
    logprobs: list[Any]
    reasons: tuple[str | None, int | str | None]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    """Its blocks are too few for all: they preempt each other."""
    folder = tmp_path_factory.mktemp("llama")
    save_with_tokenizer(tiny_llama(), folder)
    args = AsyncEngineArgs(
        model=str(folder),
        dtype="float32",
        batch_invariant=True,
        max_model_len=256,
        block_size=8,
        num_gpu_blocks_override=120,
        max_num_batched_tokens=48,
        max_replays=100,
    )
    engine = AsyncLLM.from_engine_args(args)
    yield engine
    engine.shutdown()


async def ask(engine: AsyncLLM, name: str) -> list[Seen]:
    prompt, wanted = ASKED[name]
    given: dict[str, Any] = {"seed": 1, "max_tokens": LONG, "ignore_eos": True}
    return await read(engine, prompt, given | wanted, RequestOutputKind.DELTA)


async def read(engine: AsyncLLM, prompt: Any, wanted: dict[str, Any], kind: RequestOutputKind) -> list[Seen]:
    """Deltas are put together."""
    params = SamplingParams(**wanted, output_kind=kind)
    parts: dict[int, Seen] = {}
    prompt_logprobs: list[Any] = []
    async for output in engine.generate(prompt, params):
        if kind is not RequestOutputKind.DELTA:
            parts.clear()
            prompt_logprobs.clear()
        prompt_logprobs += output.prompt_logprobs or []
        for part in output.outputs:
            before = parts.get(part.index, Seen("", [], [], (None, None)))
            assert before.reasons == (None, None)
            parts[part.index] = Seen(
                before.text + part.text,
                before.token_ids + part.token_ids,
                before.logprobs + list(part.logprobs or []),
                (part.finish_reason, part.stop_reason),
            )
        num_prompt_tokens = len(output.prompt_token_ids)
    assert len(prompt_logprobs) == (num_prompt_tokens if params.prompt_logprobs is not None else 0)
    return [parts[index] for index in range(params.n)]


async def kill(engine: AsyncLLM, core: bool) -> None:
    """The core, or its worker, in the middle of everything; returns when it is back."""
    if core:
        number = engine._client.num_restarts
        os.kill(engine._client.info.pid, signal.SIGKILL)
        await until(lambda: engine._client.num_restarts > number)
        return
    (worker,) = psutil.Process(engine._client.info.pid).children()
    number = (await engine.get_stats())[0].num_restarts
    worker.kill()
    while (await engine.get_stats())[0].num_restarts == number:
        pass


async def until_generated(engine: AsyncLLM, count: int) -> None:
    def generated() -> int:
        requests = map(engine._table.get, engine._table.ids())
        return sum(part.num_tokens for request in requests if request for part in request.completions)

    await until(lambda: generated() >= count)


async def until(done: Callable[[], bool]) -> None:
    while not done():  # noqa: ASYNC110 (nobody announces it)
        await asyncio.sleep(0.002)


def test_nothing_changes_in_a_storm(engine: AsyncLLM) -> None:
    async def main() -> None:
        alone = {name: await ask(engine, name) for name in ASKED}
        tasks = {name: asyncio.create_task(ask(engine, name)) for name in ASKED}
        for count, core in ((300, False), (800, True)):
            await until_generated(engine, count)
            await kill(engine, core)
        for name, task in tasks.items():
            assert await task == alone[name], name
        check(alone)
        stats = (await engine.get_stats())[0]
        assert stats.num_preemptions > 0
        assert stats.num_free_blocks == stats.num_blocks

    asyncio.run(asyncio.wait_for(main(), 240))


def check(seen: dict[str, list[Seen]]) -> None:
    """Each of the rules had its say, and late enough to be the same after a storm by its own doing."""
    thinking = seen["thinking budget"][0].token_ids
    assert thinking.index(END_THINK) == 89
    repeated = seen["repetition"][0]
    assert repeated.reasons == ("repetition", "repetition_detected")
    assert len(repeated.token_ids) >= 60
    assert not any(word in seen["bad words"][0].text for word in ("`a", "ab", "bcd", "c"))
    held = seen["min tokens"][0]
    assert not set(held.token_ids[:120]) & set(LETTERS[:3])
    assert held.reasons[1] in LETTERS[:3]
    assert seen["stop string"][0].reasons[0] == "stop"
    assert len(seen["stop string"][0].token_ids) > 100
    assert seen["regular expression"][0].text.count(" ") >= 9
    assert len({part.text for part in seen["several"]}) == 3


def test_an_output_is_its_own(engine: AsyncLLM) -> None:
    """What a reader does to an output does not show in the next one, nor in the engine."""

    async def main() -> tuple[list[int], RequestOutput]:
        params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True, logprobs=1, prompt_logprobs=1)
        good = [output async for output in engine.generate([1, 2, 3], params)][-1]
        async for output in engine.generate([1, 2, 3], params):
            last = output.outputs[0].token_ids.copy()
            shown = output.outputs[0]
            assert shown.logprobs is not None
            assert len(shown.logprobs) == len(shown.token_ids)
            shown.token_ids.clear()
            assert isinstance(shown.logprobs, list)
            shown.logprobs.clear()
            output.outputs.clear()
            with pytest.raises(AttributeError):
                output.finished = True  # type: ignore[misc]
        return last, good

    last, good = asyncio.run(asyncio.wait_for(main(), 250))
    assert last == good.outputs[0].token_ids


# --- any mix ---------------------------------------------------------------------------------------------


def some_mix(rng: random.Random) -> dict[str, Any]:
    """Parameters that a request may have together."""
    letters = LETTERS[: rng.choice([2, 4, 8])]
    max_tokens = rng.choice([1, 2, 7, 30, 80])
    wanted: dict[str, Any] = {"seed": rng.randrange(1000), "max_tokens": max_tokens}
    wanted["temperature"] = rng.choice([0, 0.5, 1, 1.7])
    optional: list[dict[str, Any]] = [
        {"n": rng.choice([2, 3]) if wanted["temperature"] else 1},
        {"logprobs": rng.choice([0, 1, 5])},
        {"prompt_logprobs": rng.choice([0, 3])},
        {"flat_logprobs": True},
        {"allowed_token_ids": [*letters, 257]},
        {"stop": rng.sample(["a", "ab", "abc", "cc", "\ufffd", "zz", "</s>"], 2)},
        {"include_stop_str_in_output": True},
        {"min_tokens": min(max_tokens, rng.choice([1, 5, 40]))},
        {"stop_token_ids": rng.sample(letters, 1)},
        {"ignore_eos": True},
        {"skip_special_tokens": False},
        {"top_k": rng.choice([1, 3, 50]), "top_p": rng.choice([0.3, 0.9])},
        {"min_p": 0.1},
        {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.5},
        {"bad_words": ["ab", "b c"]},
        {"logit_bias": {257: rng.choice([5, -5])}},
        {"repetition_detection": RepetitionDetectionParams(4, 1, 3)},
        {"thinking_token_budget": rng.choice([0, 3])},
        {"skip_reading_prefix_cache": True},
    ]
    for each in optional:
        if rng.random() < 0.3:
            wanted |= each
    return wanted


def test_any_mix_reads_the_same_in_every_kind(engine: AsyncLLM) -> None:
    """And it is what decoding its tokens at once gives, up to what stopped it."""
    rng = random.Random(6)
    prompts: list[Any] = ["a", "水🎡é", "the wheel " * 5, [THINK, 70], [1] * 150, list(range(60, 90))]

    async def one(prompt: Any, wanted: dict[str, Any]) -> None:
        whole, final, deltas = await asyncio.gather(
            *(read(engine, prompt, wanted, kind) for kind in RequestOutputKind)
        )
        assert whole == final == deltas, wanted
        for part in whole:
            check_text(engine, part, wanted)

    async def main() -> None:
        for _ in range(8):
            await asyncio.gather(*(one(rng.choice(prompts), some_mix(rng)) for _ in range(12)))

    asyncio.run(asyncio.wait_for(main(), 240))


def check_text(engine: AsyncLLM, part: Seen, wanted: dict[str, Any]) -> None:
    skip = wanted.get("skip_special_tokens", True)
    include = wanted.get("include_stop_str_in_output", False)
    decode = engine.get_tokenizer().decode
    text = decode(part.token_ids, skip_special_tokens=skip)
    reason, stop = part.reasons
    if isinstance(stop, str) and reason == "stop":
        assert text.startswith(part.text if include else part.text + stop), wanted
        assert part.text.endswith(stop) or not include
    elif reason == "stop" and not include:
        assert part.text == decode(part.token_ids[:-1], skip_special_tokens=skip), wanted
    else:
        assert part.text == text, wanted
    if "logprobs" in wanted:
        assert len(part.logprobs) == len(part.token_ids)
        shown = zip(part.token_ids, part.logprobs, strict=True)
        pieces = "".join(here[token].decoded_token or "" for token, here in shown)
        assert decode(part.token_ids, skip_special_tokens=False).startswith(pieces), wanted
    if reason == "stop":
        assert len(part.token_ids) >= wanted.get("min_tokens", 0), wanted
    elif reason == "length":
        assert len(part.token_ids) == wanted["max_tokens"], wanted
