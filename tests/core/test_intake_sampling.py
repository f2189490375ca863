"""The core believes no client: every field of `Sampling` at its limit and one beyond it."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from headrace.core.intake import make_requests
from headrace.core.request import Request
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import RequestError
from headrace.ipc.messages import AddRequest, Sampling, ThinkingBudget, pack

Take = Callable[..., list[Request]]
FLOAT = array("f", [1.0]).tobytes()


@pytest.fixture
def take(make_config: Callable[..., EngineConfig]) -> Take:
    config = make_config(vocab_size=1000, max_logprobs=20)

    def run(n: int = 1, **fields: Any) -> list[Request]:
        return list(make_requests(b"", AddRequest(1, pack([5]), Sampling(**fields), 8, n), config, 0.0))

    return run


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("logprobs", {"logprobs": 20}, {"logprobs": 21}),
        ("logprobs", {"logprobs": 0}, {"logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": 20}, {"prompt_logprobs": 21}),
        ("logprob_token_ids", {"logprob_token_ids": [0] * 128}, {"logprob_token_ids": [0] * 129}),
        ("logprob_token_ids", {"logprob_token_ids": [999]}, {"logprob_token_ids": [1000]}),
        ("allowed_token_ids", {"allowed_token_ids": pack([999])}, {"allowed_token_ids": pack([1000])}),
        ("allowed_token_ids", {"allowed_token_ids": pack([0, 1])}, {"allowed_token_ids": pack([1, 1])}),
        ("allowed_token_ids", {"allowed_token_ids": pack([1])}, {"allowed_token_ids": b"abc"}),
        (
            "logit_bias",
            {"bias_tokens": pack([999]), "bias_values": FLOAT},
            {"bias_tokens": pack([-1]), "bias_values": FLOAT},
        ),
        (
            "logit_bias",
            {"bias_tokens": pack([1]), "bias_values": FLOAT},
            {"bias_tokens": pack([1]), "bias_values": array("f", [math.nan]).tobytes()},
        ),
        (
            "logit_bias",
            {"bias_tokens": pack([1]), "bias_values": FLOAT},
            {"bias_tokens": pack([1, 2]), "bias_values": FLOAT},
        ),
        ("bad_words", {"bad_words": [[1] * (1 << 16)]}, {"bad_words": [[1] * (1 << 16), [1]]}),
        ("bad_words", {"bad_words": [[999]]}, {"bad_words": [[]]}),
        ("bad_words", {"bad_words": []}, {"bad_words": [[1000]]}),
        (
            "thinking",
            {"thinking": ThinkingBudget(0, 1, 999)},
            {"thinking": ThinkingBudget(0, 1, 1000)},
        ),
        ("thinking", {"thinking": ThinkingBudget(0, 1, 2)}, {"thinking": ThinkingBudget(-1, 1, 2)}),
    ],
)
def test_limits(take: Take, name: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    assert len(take(**good)) == 1
    with pytest.raises(RequestError, match=name) as caught:
        take(**bad)
    assert caught.value.parameter == name
    assert caught.value.limit is not None


def test_children_have_seeds_of_their_own_and_the_prompt_is_told_of_once(take: Take) -> None:
    children = take(n=3, seed=2**63 - 2, prompt_logprobs=1, logprobs=2)
    assert [child.sampling.seed for child in children] == [2**63 - 2, 2**63 - 1, 0]
    assert [child.sampling.prompt_logprobs for child in children] == [1, None, None]
    assert [child.sampling.logprobs for child in children] == [2, 2, 2]
