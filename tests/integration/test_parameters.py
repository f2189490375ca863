"""Any value for any parameter, through the public API: served or refused by name, and nobody else notices."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from headrace import AsyncEngineArgs, AsyncLLM, HeadraceError, RequestError, RequestOutputKind, SamplingParams
from headrace.frontend.repetition import RepetitionDetectionParams
from headrace.ipc.oracle import oracle_stream
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

VOCAB = 1000
numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, -1, 1, 2**31 - 1, 2**31, 2**63 - 16384, 2**63, -(2**63), 10**400, True, False]),
    st.floats(),
    st.sampled_from(
        [0.0, -0.0, 1e-9, 0.01, 1.0, 2.0, 2.0000001, math.nan, math.inf, -math.inf, 1e308, 5e-324]
    ),
)
ids = st.one_of(st.integers(-1, VOCAB + 1), st.sampled_from([0, VOCAB - 1, VOCAB, 2**31, -(2**40), 1.5, "7"]))
anything = st.one_of(
    st.none(),
    numbers,
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(ids, max_size=5),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(ids, numbers, max_size=4),
    st.just(object()),
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "logit_bias": st.dictionaries(ids, numbers, max_size=4),
    "allowed_token_ids": st.lists(ids, max_size=5),
    "logprob_token_ids": st.lists(ids, max_size=5),
    "stop_token_ids": st.lists(ids, max_size=5),
    "bad_words": st.lists(st.text(max_size=3), max_size=3),
    "output_kind": st.sampled_from(RequestOutputKind),
    "repetition_detection": st.builds(
        RepetitionDetectionParams, st.integers(0, 1024), st.just(0), st.integers(2, 9)
    ),
}
NAMES = sorted(SamplingParams.__dataclass_fields__)
parameters = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries(
        {name: st.one_of(LIKELY.get(name, numbers), anything) for name in names}
    )
)


@pytest.fixture(scope="module")
def engine(oracle_args: Callable[..., AsyncEngineArgs]) -> Iterator[AsyncLLM]:
    engine = AsyncLLM.from_engine_args(oracle_args(max_model_len=64, max_num_seqs=64))
    yield engine
    engine.shutdown()


async def neighbour(engine: AsyncLLM) -> None:
    """A good request gets what it always gets."""
    params = SamplingParams(seed=5, max_tokens=8, ignore_eos=True)
    outputs = [output async for output in engine.generate([1, 2, 3], params)]
    assert outputs[-1].outputs[0].token_ids == oracle_stream([1, 2, 3], 5, 8, VOCAB)


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(wanted=parameters)
def test_served_or_refused_by_name(engine: AsyncLLM, wanted: dict[str, Any]) -> None:
    async def main() -> None:
        refused: HeadraceError | None = None
        async with asyncio.timeout(60):
            task = asyncio.create_task(neighbour(engine))
            try:
                params = SamplingParams(**({"max_tokens": 4} | wanted))
                if params.n > 64:
                    params.n = 64  # all would be served, in a while
                outputs = [output async for output in engine.generate([7, 8], params)]
                assert outputs[-1].finished
            except HeadraceError as error:
                refused = error
            await task
        assert engine.is_running
        if refused is not None:
            assert isinstance(refused, RequestError), refused
            assert refused.parameter is not None
            assert refused.limit is not None

    asyncio.run(main())
