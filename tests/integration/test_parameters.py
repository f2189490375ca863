"""Any value for any parameter, through the public API: served or refused by name, and nobody else notices."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    HeadraceError,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    RequestTimeouts,
    SamplingParams,
    StructuredOutputsParams,
)
from headrace.frontend.call_forms import refuse_set
from headrace.frontend.repetition import RepetitionDetectionParams
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.tiny_llama import VOCAB, save_with_tokenizer, tiny_llama

CONTEXT = 64
PROMPT = [7, 8]
GOOD = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("llama")
    save_with_tokenizer(tiny_llama(), folder)
    args = AsyncEngineArgs(
        model=str(folder),
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_seqs=64,
        num_gpu_blocks_override=500,
        scheduling_policy="priority",
    )
    engine = AsyncLLM.from_engine_args(args)
    yield Bench(engine, asyncio.run(ask(engine, GOOD)).outputs[0].token_ids)
    engine.shutdown()


async def ask(engine: AsyncLLM, params: object, prompt: Any = PROMPT, **call: Any) -> RequestOutput:
    outputs = [output async for output in engine.generate(prompt, params, **call)]
    assert outputs[-1].finished
    return outputs[-1]


class Bench:
    """An engine on which a good request always runs beside the one that is tried."""

    def __init__(self, engine: AsyncLLM, alone: list[int]) -> None:
        self._engine = engine
        self._alone = alone

    def run(self, params: object, prompt: Any = PROMPT, **call: Any) -> RequestOutput | HeadraceError:
        """What the other one gets; the good one gets what it always gets."""

        async def main() -> RequestOutput | HeadraceError:
            async with asyncio.timeout(120):
                good = asyncio.create_task(ask(self._engine, GOOD))
                try:
                    return await ask(self._engine, params, prompt, **call)
                except HeadraceError as error:
                    return error
                finally:
                    assert (await good).outputs[0].token_ids == self._alone
                    assert self._engine.num_unfinished_requests == 0

        return asyncio.run(main())


# --- each parameter's limits -----------------------------------------------------------------------------


class Edge(NamedTuple):
    """Values of a parameter on both sides of its limits."""

    served: list[Any]
    refused: list[Any]


def reals(low: float, high: float, beyond: list[float]) -> Edge:
    return Edge([low, high, int(high)], [*beyond, NAN, INF, -INF, 10**400, "1", None, True, [1.0]])


def flag(*more: Any) -> Edge:
    return Edge([False, True, *more], [1, 0, "yes", *([] if more else [None])])


LONGEST = CONTEXT - len(PROMPT)
IDS: list[Any] = [[-1], [VOCAB], [2**31], [1.5], ["7"], [True], 7, "7", {7}]
EDGES: dict[str, Edge] = {
    "n": Edge([1, 64], [0, -1, 16385, 1.0, NAN, "1", None, True]),
    "presence_penalty": reals(-2, 2, [-2.000001, 2.000001]),
    "frequency_penalty": reals(-2, 2, [-2.000001, 2.000001]),
    "repetition_penalty": reals(1e-30, 1e30, [0, -1, 1e31]),
    "temperature": reals(0, 2, [-1e-9, 2.000001]),
    "top_p": reals(1e-300, 1, [0, 5e-324, 1.000001, -0.5]),
    "top_k": Edge([-1, 0, 1, VOCAB, VOCAB + 1, 2**31 - 1], [-2, 2**31, 1.0, NAN, "1", None, True]),
    "min_p": reals(0, 1, [-1e-9, 1.000001]),
    "seed": Edge([None, -1, 0, 2**63 - 16384], [-2, 2**63 - 16383, 1.0, NAN, "1", True]),
    "stop": Edge(
        [None, [], "a", ("a", "水"), ["b"] * 1024, "x" * 4096],
        ["", [""], ["b"] * 1025, "x" * 4097, [1], 1, b"a", "\ud800", ["\udfff"]],
    ),
    "stop_token_ids": Edge([None, [], (0, VOCAB - 1), [3, 3]], IDS),
    "ignore_eos": flag(),
    "max_tokens": Edge([None, 1, LONGEST, 2**31 - 1], [0, -1, 2**31, 1.0, NAN, "1", True]),
    "min_tokens": Edge([0, LONGEST], [-1, LONGEST + 1, 2**31, 1.0, NAN, "1", None, True]),
    "logprobs": Edge([None, True, False, 0, 20], [-1, 21, -2, 1.0, NAN, "1", [1]]),
    "prompt_logprobs": Edge([None, True, False, 0, 20], [-1, 21, -2, 1.0, NAN, "1", [1]]),
    "logprob_token_ids": Edge([None, [], [0, VOCAB - 1], list(range(128))], [*IDS, list(range(129))]),
    "flat_logprobs": flag(),
    "detokenize": flag(),
    "skip_special_tokens": flag(),
    "spaces_between_special_tokens": flag(),
    "include_stop_str_in_output": flag(),
    "output_kind": Edge(list(RequestOutputKind), [0, 1, "DELTA", None]),
    "skip_clone": flag(),
    "structured_outputs": Edge(
        [None, StructuredOutputsParams(regex="[ab]{3}"), StructuredOutputsParams(choice=["yes", "水"])],
        [{"regex": "a"}, "a", StructuredOutputsParams(regex="("), StructuredOutputsParams(grammar="no")],
    ),
    "logit_bias": Edge(
        [None, {}, {0: 1, VOCAB - 1: -1.5}, {5: 3.4e38}, {5: -3.4e38}],
        [{VOCAB: 1.0}, {-1: 1.0}, {"5": 1.0}, {5: NAN}, {5: INF}, {5: 1e39}, {5: None}, {5: True}, [5], 5],
    ),
    "allowed_token_ids": Edge([None, [0], (3, VOCAB - 1), list(range(VOCAB))], [*IDS, []]),
    "extra_args": Edge([None, {}], [{"a": 1}, [], 1]),
    "routed_experts_prompt_start": Edge([0], [1, -1, 0.0, False, None, "0"]),
    "bad_words": Edge(
        [None, [], ["a", "水車"], "ab", ["b"] * 1024, ["x" * 4096], [" "]],
        [[""], ["b"] * 1025, ["x" * 4097], [1], 1, b"a", ["\ud800"]],
    ),
    "skip_reading_prefix_cache": flag(None),
    "thinking_token_budget": Edge([None, -1, 0, 2**31 - 1], [-2, 2**31, 1.0, NAN, "1", True]),
    "repetition_detection": Edge(
        [None, RepetitionDetectionParams(), RepetitionDetectionParams(1024, 1, 2)], [{}, 1, "x"]
    ),
}


def test_every_parameter_has_its_limits_below() -> None:
    assert set(EDGES) == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize("name", sorted(EDGES))
def test_served_at_the_limit_and_refused_beyond_it(bench: Bench, name: str) -> None:
    """Also when the parameters were good once: the engine looks again."""
    for value in EDGES[name].served:
        params = SamplingParams(
            **({"max_tokens": 4, "temperature": 1.0} | _room(name, value) | {name: value})
        )
        output = bench.run(params)
        assert isinstance(output, RequestOutput), (value, output)
        assert len(output.outputs) == params.n
    for value in EDGES[name].refused:
        params = SamplingParams(max_tokens=None if name == "min_tokens" else 4)
        setattr(params, name, value)
        error = bench.run(params)
        assert isinstance(error, RequestError), (value, error)
        assert (error.parameter, error.code) == (name, "request"), (value, error)
        assert error.limit is not None or name == "structured_outputs"  # that says where its text is wrong


def _room(name: str, value: Any) -> dict[str, Any]:
    return {"max_tokens": value} if name == "min_tokens" and value else {}


CALL_EDGES: dict[str, Edge] = {
    "prompt": Edge(
        [
            "a",
            "水🎡" * 8,
            " ",
            "\0",
            [0],
            (VOCAB - 1,),
            [1] * (CONTEXT - 1),
            {"prompt": "a"},
            {"prompt_token_ids": [1], "prompt": "a", "cache_salt": "s" * 1024, "multi_modal_data": None},
            {"prompt": "a", "multi_modal_data": {}, "mm_processor_kwargs": {}},
        ],
        ["", [], [1] * CONTEXT, "a" * CONTEXT, "\ud800", {"prompt": "\udc00"}, 1, b"a", {}, NAN, {1}],
    ),
    "prompt_token_ids": Edge([], [[VOCAB], [-1], [2**40], [1.0], [True], ["1"], [NAN], [None]]),
    "request_id": Edge([None, "x", "水", "x" * 10_000], ["", 1, b"x", True, ["x"]]),
    "priority": Edge([0, 2**31 - 1, 1 - 2**31], [2**31, -(2**31), 1.0, NAN, INF, "1", None, True]),
    "prompt_text": Edge([None, "", "shown"], [1, b"x", ["x"], True]),
    "timeout": Edge(
        [None, 0, 1e9, 1e-320, RequestTimeouts(total=50), RequestTimeouts(50, 50, 50)],
        [-1, -1e-9, 1.1e9, NAN, INF, 10**400, "1", True, [1]],
    ),
    "sampling_params": Edge([None, SamplingParams(max_tokens=2)], [{}, {"n": 1}, 1, "x"]),
    "lora_request": Edge([None], [object(), 1]),
    "data_parallel_rank": Edge([None, 0], [1, -1]),
    "tokenization_kwargs": Edge([None, {}], [{"truncate_prompt_tokens": 3}]),
    "mm_processor_kwargs": Edge([None, {}], [{"size": 3}]),
    "trace_headers": Edge([None, {}], [{"traceparent": "x"}]),
    "reasoning_ended": Edge([None, False], [True]),
    "reasoning_parser_kwargs": Edge([None, {}], [{"a": 1}]),
}


@pytest.mark.parametrize("name", sorted(CALL_EDGES))
def test_arguments_of_generate(bench: Bench, name: str) -> None:
    for value in CALL_EDGES[name].served:
        output = bench.run(**_call(name, value))
        assert isinstance(output, RequestOutput), (value, output)
    for value in CALL_EDGES[name].refused:
        error = bench.run(**_call(name, value))
        assert isinstance(error, RequestError), (value, error)
        assert error.parameter == name, (value, error)


def _call(name: str, value: Any) -> dict[str, Any]:
    call: dict[str, Any] = {"params": SamplingParams(max_tokens=3)}
    if name == "sampling_params":
        return {"params": value}
    return call | {"prompt" if name == "prompt_token_ids" else name: value}


# --- anything at all -------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, -1, 1, 2**31 - 1, 2**31, 2**63 - 16384, 2**63, -(2**63), 10**400, True, False]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-9, 0.01, 1.0, 2.0, 2.0000001, NAN, INF, -INF, 1e308, 5e-324]),
)
ids = st.one_of(st.integers(-1, VOCAB + 1), st.sampled_from([0, VOCAB - 1, VOCAB, 2**31, -(2**40), 1.5, "7"]))
words = st.text(st.characters(codec=None), max_size=3)  # lone surrogates, too
anything = st.one_of(
    st.none(),
    numbers,
    words,
    st.binary(max_size=3),
    st.lists(ids, max_size=5),
    st.lists(words, max_size=3),
    st.dictionaries(ids, numbers, max_size=4),
    st.just(object()),
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "logit_bias": st.dictionaries(ids, numbers, max_size=4),
    "allowed_token_ids": st.lists(ids, max_size=5),
    "logprob_token_ids": st.lists(ids, max_size=5),
    "stop_token_ids": st.lists(ids, max_size=5),
    "stop": st.lists(words, max_size=3),
    "bad_words": st.lists(words, max_size=3),
    "output_kind": st.sampled_from(RequestOutputKind),
    "structured_outputs": st.builds(
        StructuredOutputsParams, regex=st.sampled_from(["[a-c]{2}", "(", "水*", "a|b|", r"\d{1,3}"])
    ),
    "repetition_detection": st.builds(
        RepetitionDetectionParams, st.integers(0, 1024), st.just(0), st.integers(2, 9)
    ),
}
FLAGS = [name for name, edge in EDGES.items() if True in edge.served]
LIKELY |= dict.fromkeys(FLAGS, st.booleans())
several = st.lists(st.sampled_from(sorted(EDGES)), min_size=1, max_size=4, unique=True)
parameters = several.flatmap(
    lambda names: st.fixed_dictionaries(
        {name: st.one_of(LIKELY.get(name, numbers), anything) for name in names}
    )
)
calls = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.one_of(words, st.lists(ids, max_size=4), anything, st.builds(dict, prompt=words)),
        "request_id": anything,
        "priority": anything,
        "prompt_text": anything,
        "timeout": st.one_of(st.floats(0, 50), anything),
        "trace_headers": anything,
    },
)
QUICK = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@settings(QUICK, max_examples=250)
@given(wanted=parameters)
def test_parameters_are_served_or_refused_by_name(bench: Bench, wanted: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**({"max_tokens": 4} | wanted))
    except RequestError as error:
        check_refusal(error)
        return
    params.n = min(params.n, 64)  # all would be served, in a while
    check_refusal(bench.run(params))


@settings(QUICK, max_examples=150)
@given(call=calls)
def test_calls_are_served_or_refused_by_name(bench: Bench, call: dict[str, Any]) -> None:
    check_refusal(bench.run(SamplingParams(max_tokens=3), **call))


def check_refusal(result: RequestOutput | HeadraceError) -> None:
    if isinstance(result, HeadraceError):
        assert isinstance(result, RequestError), result
        assert result.parameter is not None
        assert result.limit is not None or "not supported" in str(result), result


def test_options_that_nobody_knows() -> None:
    with pytest.raises(TypeError, match="lora_reqest"):
        refuse_set({"lora_reqest": None})
