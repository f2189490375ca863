"""Sampling parameters through the whole engine, with a small Llama whose weights are random and float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from headrace import LLM, RequestError, RequestOutput, SamplingParams
from headrace.frontend.repetition import RepetitionDetectionParams
from tokenizers import decoders, models, pre_tokenizers

VOCAB = 261
THINK, END_THINK = 258, 259


@pytest.fixture(scope="module")
def peer() -> Any:
    """The model in transformers."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=257,
    )
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def llm(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Its tokens are the 256 bytes and a few special ones; steps are small and blocks few."""
    folder: Path = tmp_path_factory.mktemp("llama")
    logging.disable(logging.WARNING)
    peer.save_pretrained(folder)
    logging.disable(logging.NOTSET)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<think>", "</think>", "spare"])
    backend.save(str(folder / "tokenizer.json"))
    with LLM(
        str(folder), dtype="float32", max_num_batched_tokens=32, block_size=4, num_gpu_blocks_override=90
    ) as llm:
        yield llm


def run(llm: LLM, prompt: list[int] | str, **changes: Any) -> RequestOutput:
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True, "seed": 1}
    return llm.generate(prompt, SamplingParams(**(params | changes)), use_tqdm=False)[0]


def tokens(llm: LLM, prompt: list[int] | str, **changes: Any) -> list[int]:
    return run(llm, prompt, **changes).outputs[0].token_ids


def test_only_allowed_tokens_come(llm: LLM) -> None:
    assert set(tokens(llm, "abc", allowed_token_ids=[5, 9, 200])) <= {5, 9, 200}


def test_a_bias_decides(llm: LLM) -> None:
    assert set(tokens(llm, "abc", logit_bias={17: 1000.0}, temperature=0)) == {17}
    free = tokens(llm, "abc", temperature=0)
    kept = tokens(llm, "abc", temperature=0, logit_bias=dict.fromkeys(set(free), -1000.0))
    assert not set(free) & set(kept)


def test_bad_words_do_not_come(llm: LLM) -> None:
    letters = {"allowed_token_ids": llm.get_tokenizer().encode("ab c")}
    assert "ab" in run(llm, "x", **letters).outputs[0].text
    text = run(llm, "x", bad_words=["ab", "bb", "c"], **letters).outputs[0].text
    assert not any(word in text for word in ("ab", "bb", "c"))


def test_stop_tokens_wait_for_min_tokens(llm: LLM) -> None:
    letters = llm.get_tokenizer().encode("abcd")
    wanted = {"allowed_token_ids": letters, "stop_token_ids": letters[:2], "seed": 4}
    assert len(tokens(llm, "x", **wanted)) < 20
    output = run(llm, "x", min_tokens=20, **wanted).outputs[0]
    assert not set(output.token_ids[:20]) & set(letters[:2])
    assert output.stop_reason in letters[:2]


def test_thinking_is_cut_short(llm: LLM) -> None:
    found = tokens(llm, [THINK, 5], thinking_token_budget=4, logit_bias={END_THINK: -1000.0})
    assert found.index(END_THINK) == 3
    assert END_THINK not in found[4:]


def test_repetition_ends_a_request(llm: LLM) -> None:
    wanted = RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=1, min_count=4)
    output = run(llm, "x", temperature=0, logit_bias={17: 1000.0}, repetition_detection=wanted).outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("repetition", "repetition_detected")
    assert output.token_ids == [17] * 4


def test_skipping_the_prefix_cache(llm: LLM) -> None:
    prompt = list(range(40))
    run(llm, prompt)
    assert run(llm, prompt).num_cached_tokens == 36
    assert run(llm, prompt, skip_reading_prefix_cache=True).num_cached_tokens == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {VOCAB: 1.0}},
        {"allowed_token_ids": [VOCAB]},
        {"stop_token_ids": [VOCAB]},
        {"extra_args": {"kv_transfer_params": {}}},
        {"routed_experts_prompt_start": 1},
    ],
)
def test_what_cannot_be_done_is_refused(llm: LLM, changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        run(llm, "x", **changes)
    assert caught.value.parameter in changes
