"""Sampling parameters: vLLM's defaults and limits, and an error that names what is wrong."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
from headrace import RequestError, RequestOutputKind, SamplingParams
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
    ("logprobs", 0),
    ("prompt_logprobs", 1),
    ("logprob_token_ids", [1]),
    ("flat_logprobs", True),
    ("structured_outputs", {"json": {}}),
    ("logit_bias", {1: 2.0}),
    ("allowed_token_ids", [1]),
    ("extra_args", {"a": 1}),
    ("routed_experts_prompt_start", 1),
    ("bad_words", ["a"]),
    ("skip_reading_prefix_cache", True),
    ("thinking_token_budget", 1),
    ("repetition_detection", object()),
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
    params = SamplingParams(stop="x", seed=-1, top_k=-1)
    assert params.stop == ["x"]
    assert params.seed is None
    assert params.to_wire([], 5).top_k == 0


def test_low_temperature_is_raised_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "headrace"):
        assert SamplingParams(temperature=0.001).temperature == 0.01
    assert "0.001" in caplog.text
    assert SamplingParams(temperature=1e-6).is_greedy


def test_greedy_has_one_completion_and_neutral_filters() -> None:
    with pytest.raises(RequestError, match="n must be 1 when using greedy"):
        SamplingParams(temperature=0, n=2)
    wire = SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1).to_wire([2], 7)
    assert (wire.temperature, wire.top_p, wire.top_k, wire.min_p) == (0.0, 1.0, 0, 0.0)


def test_end_of_sequence_on_the_wire() -> None:
    params = SamplingParams(stop_token_ids=[9, 3], seed=1)
    wire = params.to_wire([2, 3, 4], 7)
    assert (wire.eos_token_id, wire.stop_token_ids, wire.seed) == (2, [9, 3, 4], 1)
    assert params.stop_token_ids == [9, 3]
    ignoring = SamplingParams(stop_token_ids=[9], ignore_eos=True).to_wire([2, 3], 7)
    assert (ignoring.eos_token_id, ignoring.stop_token_ids, ignoring.seed) == (None, [9], 7)


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
    """Whatever is given is accepted in a form that the wire takes, or refused by name."""
    refused: RequestError | None = None
    try:
        wire = SamplingParams(**{name: value}).to_wire([1], 3)
    except RequestError as error:
        refused = error
    if refused is not None:
        assert refused.parameter is not None
        return
    assert math.isfinite(wire.temperature + wire.top_p + wire.min_p + wire.repetition_penalty)
    assert 0 <= wire.seed < 2**63
