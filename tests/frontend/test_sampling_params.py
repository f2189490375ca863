"""Sampling parameters: vLLM's defaults and limits, and an error that names what is wrong."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from headrace import RequestError, RequestOutputKind, SamplingParams
from headrace.frontend.repetition import RepetitionDetectionParams
from hypothesis import given
from hypothesis import strategies as st

BAD: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", True),
    ("n", 1.0),
    ("n", 16385),
    ("presence_penalty", 2.01),
    ("frequency_penalty", -2.01),
    ("repetition_penalty", 0),
    ("repetition_penalty", math.inf),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", math.nan),
    ("temperature", "1"),
    ("temperature", None),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_k", True),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", -2),
    ("seed", 2**63),
    ("seed", 1.5),
    ("stop", [""]),
    ("stop", 3),
    ("stop", ["a", 1]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", [True]),
    ("stop_token_ids", 7),
    ("max_tokens", 0),
    ("max_tokens", 2.0),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("ignore_eos", 1),
    ("detokenize", None),
    ("skip_special_tokens", "yes"),
    ("include_stop_str_in_output", 0),
    ("output_kind", 1),
    ("logprobs", -2),
    ("logprobs", 1.0),
    ("prompt_logprobs", -2),
    ("prompt_logprobs", "all"),
    ("logprob_token_ids", 1),
    ("logprob_token_ids", [-1]),
    ("logprob_token_ids", list(range(129))),
    ("flat_logprobs", 1),
    ("structured_outputs", {"json": {}}),
    ("extra_args", {"a": 1}),
    ("routed_experts_prompt_start", 1),
    ("repetition_detection", object()),
    ("logit_bias", [1]),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {1: 1e39}),
    ("logit_bias", {1: True}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [2**31]),
    ("allowed_token_ids", 3),
    ("allowed_token_ids", range(3)),
    ("bad_words", [""]),
    ("bad_words", [1]),
    ("bad_words", {"a"}),
    ("skip_reading_prefix_cache", 1),
    ("thinking_token_budget", -2),
    ("thinking_token_budget", 1.0),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.parameter == name
    assert caught.value.limit is not None


def test_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=2)


def test_unknown_name_is_met_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'temperature'"):
        SamplingParams(temprature=1)  # type: ignore[call-arg]


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.seed) == (16, 0, None)
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert [kind.value for kind in RequestOutputKind] == [0, 1, 2]


def test_plain_forms() -> None:
    params = SamplingParams(stop="x", seed=-1, thinking_token_budget=-1, stop_token_ids=[4, 4])
    assert params.stop == ["x"]
    assert params.stop_token_ids == [4]
    assert params.seed is None
    assert params.thinking_token_budget is None


def test_low_temperature_is_raised_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "headrace"):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    assert "0.001" in caplog.text
    assert SamplingParams(temperature=1e-9).temperature == 0.01
    assert SamplingParams(temperature=0).is_greedy


def test_greedy_has_one_completion() -> None:
    with pytest.raises(RequestError, match="n must be 1 when using greedy"):
        SamplingParams(temperature=0, n=2)


@pytest.mark.parametrize(
    ("name", "most", "beyond"),
    [
        ("n", 16384, 16385),
        ("stop", ["x" * 4096] * 1024, ["x"] * 1025),
        ("stop", "x" * 4096, "x" * 4097),
        ("bad_words", ["x" * 256] * 1024, ["x"] * 1025),
        ("bad_words", ["x" * 4096] * 64, ["x" * 4096] * 64 + ["x"]),
        ("bad_words", ["x"], ["x" * 4097]),
        ("stop_token_ids", list(range(1 << 18)), list(range(1 + (1 << 18)))),
        ("allowed_token_ids", list(range(1 << 18)), list(range(1 + (1 << 18)))),
        ("logit_bias", dict.fromkeys(range(1 << 18), 1.0), dict.fromkeys(range(1 + (1 << 18)), 1.0)),
        ("max_tokens", 2**31 - 1, 2**31),
        ("logprob_token_ids", list(range(128)), list(range(129))),
    ],
)
def test_every_limit(name: str, most: Any, beyond: Any) -> None:
    """At the limit all is well, one beyond it is refused."""
    SamplingParams(**{name: most})
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: beyond})


@pytest.mark.parametrize("numbers", [(1025, 0, 2), (4, 5, 2), (4, 1, 1), (4, -1, 2), (4, 1, (1 << 20) + 1)])
def test_repetition_is_checked(numbers: tuple[int, int, int]) -> None:
    RepetitionDetectionParams(1024, 1024, 1 << 20)
    with pytest.raises(RequestError, match="repetition_detection"):
        RepetitionDetectionParams(*numbers)


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_a_later_change_is_checked_too() -> None:
    params = SamplingParams()
    params.top_p = 3
    with pytest.raises(RequestError, match="top_p"):
        params.verify()


def test_clone_shares_nothing() -> None:
    params = SamplingParams(stop=["a"])
    twin = params.clone()
    assert twin == params
    assert isinstance(twin.stop, list)
    twin.stop.append("b")
    assert params.stop == ["a"]


def test_from_optional() -> None:
    assert SamplingParams.from_optional(temperature=None, top_k=5) == SamplingParams(top_k=5)
    assert SamplingParams.from_optional().max_tokens == 16
    assert SamplingParams.from_optional(max_tokens=None).max_tokens is None
    biased = SamplingParams.from_optional(logit_bias={"3": 1000, 4: -1000.0, 5: 1})
    assert biased.logit_bias == {3: 100.0, 4: -100.0, 5: 1.0}
    assert SamplingParams(logit_bias={3: 1000}).logit_bias == {3: 1000.0}


anything = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
)


@given(st.sampled_from(sorted({name for name, _ in BAD})), anything)
def test_nothing_but_request_errors(name: str, value: Any) -> None:
    """Whatever is given is accepted in its plain form, or refused by name."""
    refused: RequestError | None = None
    try:
        params = SamplingParams(**{name: value})
    except RequestError as error:
        refused = error
    if refused is not None:
        assert refused.parameter is not None
        return
    again = params.clone()
    again.verify()
    assert again == params
