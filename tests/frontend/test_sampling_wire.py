"""What of the sampling parameters goes to the core, and what a model cannot do."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from headrace import RequestError, SamplingParams
from headrace.frontend.sampling_wire import to_wire
from headrace.frontend.tokenizer import Tokenizer
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import Sampling, ThinkingBudget, pack

MakeConfig = Callable[..., EngineConfig]


@pytest.fixture
def wire(make_config: MakeConfig) -> Callable[..., Sampling]:
    def send(
        params: SamplingParams, tokenizer: Tokenizer | None = None, eos: tuple[int, ...] = ()
    ) -> Sampling:
        return to_wire(params, make_config(vocab_size=500, eos_token_ids=list(eos)), tokenizer, 7)

    return send


def test_greedy_has_neutral_filters(wire: Callable[..., Sampling]) -> None:
    sent = wire(SamplingParams(temperature=0, top_p=0.5, top_k=3, min_p=0.1))
    assert (sent.temperature, sent.top_p, sent.top_k, sent.min_p) == (0.0, 1.0, 0, 0.0)
    assert wire(SamplingParams(top_k=-1)).top_k == 0


def test_end_of_sequence(wire: Callable[..., Sampling]) -> None:
    params = SamplingParams(stop_token_ids=[9, 3], seed=1)
    sent = wire(params, eos=(2, 3, 4))
    assert (sent.eos_token_id, sent.stop_token_ids, sent.seed) == (2, [9, 3, 4], 1)
    assert params.stop_token_ids == [9, 3]
    ignoring = wire(SamplingParams(stop_token_ids=[9], ignore_eos=True), eos=(2, 3))
    assert (ignoring.eos_token_id, ignoring.stop_token_ids, ignoring.seed) == (None, [9], 7)


def test_rules_on_tokens(wire: Callable[..., Sampling]) -> None:
    sent = wire(SamplingParams(logit_bias={3: 0.5, 499: -7}, allowed_token_ids=[5, 0]))
    assert sent.bias_tokens == pack([3, 499])
    assert sent.bias_values == array("f", [0.5, -7]).tobytes()
    assert sent.allowed_token_ids == pack([5, 0])


def test_bad_words_at_the_start_and_after_a_space(
    wire: Callable[..., Sampling], tokenizer: Tokenizer
) -> None:
    words = wire(SamplingParams(bad_words=["fox", " the", "\n"]), tokenizer).bad_words
    spelled = {tokenizer.decode(word) for word in words}
    assert spelled == {"fox", " fox", "the", " the", "\n"}


def test_a_thinking_budget_needs_the_tokens(wire: Callable[..., Sampling], tokenizer: Tokenizer) -> None:
    params = SamplingParams(thinking_token_budget=5)
    with pytest.raises(RequestError, match="</think>") as caught:
        wire(params, tokenizer)
    assert caught.value.parameter == "thinking_token_budget"
    thinking = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.backend.to_str()))
    thinking.backend.add_tokens(["<think>", "</think>"])
    begin, end = (thinking.backend.token_to_id(text) for text in ("<think>", "</think>"))
    assert begin is not None
    assert end is not None
    assert wire(params, thinking).thinking == ThinkingBudget(5, begin, end)


def test_logprobs(make_config: MakeConfig) -> None:
    def send(most: int, **wanted: Any) -> tuple[int | None, int | None, list[int]]:
        config = make_config(vocab_size=500, max_logprobs=most)
        sent = to_wire(SamplingParams(**wanted), config, None, 7)
        return sent.logprobs, sent.prompt_logprobs, sent.logprob_token_ids

    assert send(20) == (None, None, [])
    assert send(20, logprobs=True, prompt_logprobs=20) == (1, 20, [])
    assert send(-1, logprobs=-1, prompt_logprobs=0) == (500, 0, [])
    assert send(500, logprobs=500) == (500, None, [])
    assert send(1000, logprobs=600, prompt_logprobs=501) == (500, 500, [])  # there are no more
    assert send(0, logprobs=2, logprob_token_ids=[3, 499]) == (None, None, [3, 499])


@pytest.mark.parametrize(
    ("name", "params", "eos"),
    [
        ("stop_token_ids", SamplingParams(stop_token_ids=[500]), ()),
        ("logit_bias", SamplingParams(logit_bias={500: 1.0}), ()),
        ("allowed_token_ids", SamplingParams(allowed_token_ids=[0, 500]), ()),
        ("bad_words", SamplingParams(bad_words=["x"]), ()),  # there is no tokenizer
        ("allowed_token_ids", SamplingParams(allowed_token_ids=[7], min_tokens=1), (7,)),
        ("logprobs", SamplingParams(logprobs=21), ()),
        ("logprobs", SamplingParams(logprobs=-1), ()),
        ("prompt_logprobs", SamplingParams(prompt_logprobs=21), ()),
        ("logprob_token_ids", SamplingParams(logprob_token_ids=[500]), ()),
    ],
)
def test_what_this_model_cannot_do(
    wire: Callable[..., Sampling], name: str, params: SamplingParams, eos: tuple[int, ...]
) -> None:
    with pytest.raises(RequestError) as caught:
        wire(params, eos=eos)
    assert caught.value.parameter == name
    assert caught.value.limit is not None
