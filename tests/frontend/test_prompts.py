"""The forms of a prompt, and what makes one unfit."""

from __future__ import annotations

from typing import Any

import pytest
from headrace import RequestError, SamplingParams
from headrace.frontend.call_forms import checked_id, refuse_set, tell_apart
from headrace.frontend.prompts import check_token_ids, parse_prompt
from headrace.ipc.messages import unpack


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("hi", ("hi", None, "")),
        ([1, 2], (None, [1, 2], "")),
        ((1, 2), (None, [1, 2], "")),
        ({"prompt": "hi"}, ("hi", None, "")),
        ({"prompt_token_ids": [1]}, (None, [1], "")),
        ({"prompt_token_ids": [1], "prompt": "hi", "multi_modal_data": None}, ("hi", [1], "")),
        ({"prompt": "hi", "cache_salt": "tenant"}, ("hi", None, "tenant")),
        ({"prompt": "hi", "cache_salt": "s" * 1024}, ("hi", None, "s" * 1024)),
    ],
)
def test_forms(prompt: Any, parsed: tuple[str | None, list[int] | None, str]) -> None:
    assert parse_prompt(prompt) == parsed


@pytest.mark.parametrize(
    ("prompt", "parameter"),
    [
        (None, "prompt"),
        (3, "prompt"),
        (b"hi", "prompt"),
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt_token_ids": 3}, "prompt_token_ids"),
        ({"promt": "hi"}, "promt"),
        ({"prompt": "hi", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "hi", "cache_salt": 7}, "cache_salt"),
        ({"prompt": "hi", "cache_salt": "s" * 1025}, "cache_salt"),
        ({"prompt": "hi", "cache_salt": "\udc00"}, "cache_salt"),
        ({"prompt": "hi", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
        ([1, "2"], "prompt_token_ids"),
        ([True], "prompt_token_ids"),
        ([1.0], "prompt_token_ids"),
    ],
)
def test_other_forms_are_refused(prompt: Any, parameter: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_prompt(prompt)
    assert caught.value.parameter == parameter


def test_token_ids_at_the_limit() -> None:
    assert list(unpack(check_token_ids([0, 9, 5], 10, 4))) == [0, 9, 5]


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ([], "empty"),
        ([1] * 4, "max_model_len=4"),
        ([-1], "-1 is out"),
        ([10], "10 is out"),
        ([2**40], "is out of the vocabulary"),
    ],
)
def test_unfit_token_ids(ids: list[int], names: str) -> None:
    with pytest.raises(RequestError, match=names) as caught:
        check_token_ids(ids, 10, 4)
    assert caught.value.limit is not None


PARAMS = SamplingParams()


@pytest.mark.parametrize(
    ("args", "given"),
    [
        (("hi", PARAMS, "id"), {"prompt": "hi", "sampling_params": PARAMS, "request_id": "id"}),
        (("id", "hi", PARAMS), {"prompt": "hi", "sampling_params": PARAMS, "request_id": "id"}),
        (("id", [1], PARAMS), {"prompt": [1], "sampling_params": PARAMS, "request_id": "id"}),
        (([1], None, "id"), {"prompt": [1], "request_id": "id"}),
        (("hi", PARAMS), {"prompt": "hi", "sampling_params": PARAMS}),
        (("id", [1]), {"prompt": [1], "request_id": "id"}),
        (("id",), {"request_id": "id"}),
        (([1],), {"prompt": [1]}),
        (({"prompt": "hi"},), {"prompt": {"prompt": "hi"}}),
        ((), {}),
    ],
)
def test_positional_forms_of_generate(args: tuple[Any, ...], given: dict[str, Any]) -> None:
    assert tell_apart(args) == given


def test_too_many_arguments() -> None:
    with pytest.raises(TypeError, match="at most 3"):
        tell_apart((1, 2, 3, 4))


def test_request_ids() -> None:
    assert checked_id("a") == "a"
    assert checked_id(None) != checked_id(None)
    for bad in ("", 3):
        with pytest.raises(RequestError, match="request_id"):
            checked_id(bad)


def test_options_that_exist_by_name_only() -> None:
    refuse_set({"lora_request": None, "trace_headers": None})
    with pytest.raises(RequestError, match="lora_request is not supported"):
        refuse_set({"lora_request": object()})
    with pytest.raises(TypeError, match="lora_reqest"):
        refuse_set({"lora_reqest": None})
