"""Logprobs of the oracle, each of which is known: through preemption, several clients and lagging readers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from headrace import AsyncEngineArgs, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from headrace.ipc.oracle import oracle_logprobs, oracle_stream

VOCAB = 1000


@pytest.fixture(scope="module")
def engine(oracle_args: Callable[..., AsyncEngineArgs]) -> Iterator[AsyncLLM]:
    """So few blocks that requests are preempted all the time; the whole vocabulary may be asked for."""
    args = oracle_args(
        num_gpu_blocks_override=60,
        block_size=4,
        max_model_len=200,
        max_num_batched_tokens=48,
        max_num_seqs=12,
        max_logprobs=-1,
    )
    engine = AsyncLLM.from_engine_args(args)
    yield engine
    engine.shutdown()


def check(output: RequestOutput, seed: int, most: int, prompt_most: int | None) -> None:
    ids, part = output.prompt_token_ids, output.outputs[0]
    assert part.token_ids == oracle_stream(ids, seed, len(part.token_ids), VOCAB)
    assert part.logprobs is not None
    assert len(part.logprobs) == len(part.token_ids)
    for i, (token, shown) in enumerate(zip(part.token_ids, part.logprobs, strict=True)):
        check_position(shown, token, len(ids) + i, most)
    if prompt_most is not None:
        assert output.prompt_logprobs is not None
        assert [position is None for position in output.prompt_logprobs] == [True] + [False] * (len(ids) - 1)
        for i, position in enumerate(output.prompt_logprobs):
            if position is not None:
                check_position(position, ids[i], i, prompt_most)


def check_position(shown: dict, token: int, position: int, most: int) -> None:  # type: ignore[type-arg]
    tokens = np.array([token, *((token + i) % VOCAB for i in range(most))])
    values, ranks = oracle_logprobs(np.array(token), np.array(position), tokens, VOCAB)
    found = [(other, entry.logprob, entry.rank) for other, entry in shown.items()]
    expected = zip(tokens.tolist(), values.tolist(), ranks.tolist(), strict=True)
    assert found == list({other: (other, *rest) for other, *rest in expected}.values())


def test_each_logprob_comes_once_whatever_happens(engine: AsyncLLM) -> None:
    async def one(seed: int) -> None:
        most, prompt_most = (seed % 3, None if seed % 2 else seed % 5)
        params = SamplingParams(
            seed=seed,
            max_tokens=60,
            ignore_eos=True,
            logprobs=most,
            prompt_logprobs=prompt_most,
            output_kind=list(RequestOutputKind)[seed % 3],
        )
        prompt = list(range(1, 4 + seed * 2))
        outputs = [output async for output in engine.generate(prompt, params, f"{seed}")]
        if params.output_kind is RequestOutputKind.DELTA:
            whole = outputs[0].outputs[0]
            for output in outputs[1:]:
                whole.token_ids.extend(output.outputs[0].token_ids)
                assert isinstance(whole.logprobs, list)
                assert isinstance(output.outputs[0].logprobs, list)
                whole.logprobs.extend(output.outputs[0].logprobs)
                assert output.prompt_logprobs is None
            check(outputs[0], seed, most, prompt_most)
        else:
            check(outputs[-1], seed, most, prompt_most)

    async def main() -> None:
        async with asyncio.timeout(120):
            await asyncio.gather(*(one(seed) for seed in range(30)))
        stats = (await engine._client.call("stats")).stats
        assert stats is not None
        assert stats.num_preemptions > 0
        assert stats.num_free_blocks == stats.num_blocks

    asyncio.run(main())


def test_a_reader_that_lags_gets_them_merged(engine: AsyncLLM) -> None:
    async def main() -> None:
        params = SamplingParams(
            seed=1, max_tokens=50, ignore_eos=True, logprobs=2, output_kind=RequestOutputKind.DELTA
        )
        stream = await engine.add_request("slow", [5, 6, 7], params)
        async with asyncio.timeout(120):
            await engine.wait_for_requests_to_drain()
            outputs = [output async for output in stream]
        assert len(outputs) == 1
        check(outputs[0], 1, 2, None)

    asyncio.run(main())


def test_the_whole_vocabulary(engine: AsyncLLM) -> None:
    async def main() -> None:
        params = SamplingParams(seed=1, max_tokens=3, ignore_eos=True, logprobs=-1, prompt_logprobs=-1)
        async with asyncio.timeout(120):
            outputs = [output async for output in engine.generate([5, 6, 7] * 9, params, "all")]
        check(outputs[-1], 1, VOCAB, VOCAB)

    asyncio.run(main())


def test_a_prompts_logprobs_with_the_last_token(engine: AsyncLLM) -> None:
    """They come with the first token, which may be the last one too."""

    async def main() -> None:
        params = SamplingParams(seed=1, max_tokens=1, ignore_eos=True, logprobs=1, prompt_logprobs=1)
        async with asyncio.timeout(120):
            outputs = [output async for output in engine.generate([5, 6, 7], params, "one")]
        check(outputs[-1], 1, 1, 1)

    asyncio.run(main())
