"""Sampling parameters through the whole engine, with a small Llama whose weights are random and float32."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from headrace import LLM, BeamSearchParams, RequestError, RequestOutput, RequestOutputKind, SamplingParams
from headrace.frontend.logprobs import FlatLogprobs
from headrace.frontend.repetition import RepetitionDetectionParams

from tests.integration.tiny_llama import VOCAB, save_with_tokenizer, tiny_llama

THINK, END_THINK = 258, 259


@pytest.fixture(scope="module")
def peer() -> Any:
    """The model in transformers."""
    return tiny_llama()


@pytest.fixture(scope="module")
def llm(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Steps are small and blocks few."""
    folder: Path = tmp_path_factory.mktemp("llama")
    save_with_tokenizer(peer, folder)
    with LLM(
        str(folder), dtype="float32", max_num_batched_tokens=32, block_size=4, num_gpu_blocks_override=90
    ) as llm:
        yield llm


def run(llm: LLM, prompt: list[int] | str, **changes: Any) -> RequestOutput:
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40, "ignore_eos": True, "seed": 1}
    return llm.generate(prompt, SamplingParams(**(params | changes)), use_tqdm=False)[0]


def tokens(llm: LLM, prompt: list[int] | str, **changes: Any) -> list[int]:
    return run(llm, prompt, **changes).outputs[0].token_ids


def test_a_seed_gives_the_same_alone_and_among_128_others(llm: LLM) -> None:
    """Whatever the others ask for; they preempt it, too. Its logits differ in their last digits at most."""
    seeded = SamplingParams(seed=7, max_tokens=24, ignore_eos=True, logprobs=0)
    prompt = list(b"the wheel turns")
    (alone,) = llm.generate(prompt, seeded, use_tqdm=False)
    others = [
        SamplingParams(
            temperature=i % 3 / 2,
            top_k=i % 5,
            min_p=i % 2 / 50,
            presence_penalty=i % 4 / 2,
            max_tokens=8 + i % 20,
        )
        for i in range(128)
    ]
    for repeat in range(2):
        company = [prompt, *([i % 256, *prompt[: i % 16]] for i in range(128))]
        output = llm.generate(company, [seeded, *others], use_tqdm=False)[0]
        assert output.outputs[0].token_ids == alone.outputs[0].token_ids, repeat
        assert output.outputs[0].cumulative_logprob == pytest.approx(
            alone.outputs[0].cumulative_logprob, abs=1e-4
        )


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


@torch.inference_mode()
def peer_logprobs(peer: Any, ids: list[int]) -> torch.Tensor:
    """[positions, vocab] of what follows each of the tokens."""
    result: torch.Tensor = peer(torch.tensor([ids])).logits[0].log_softmax(-1)
    return result


def check_position(shown: dict[int, Any], chosen: int, expected: torch.Tensor, most: int) -> None:
    order = expected.argsort(descending=True).tolist()
    assert next(iter(shown)) == chosen
    assert set(shown) == {chosen, *order[:most]}
    for token, entry in shown.items():
        assert abs(entry.logprob - float(expected[token])) < 1e-4
        assert entry.rank == order.index(token) + 1


def prompts(count: int) -> list[list[int]]:
    """Of 1 to 90 tokens; half of them begin alike."""
    rng = random.Random(5)
    stem = [rng.randrange(256) for _ in range(32)]
    drawn = [[rng.randrange(256) for _ in range(rng.choice([1, 7, 30, 58]))] for _ in range(count)]
    return [stem + prompt if i % 2 else prompt for i, prompt in enumerate(drawn)]


def test_every_logprob_is_transformers(llm: LLM, peer: Any) -> None:
    """Of prompts and outputs, under chunks, prefix hits and preemption, among requests without logprobs."""
    wanted = SamplingParams(
        temperature=1.0, max_tokens=40, ignore_eos=True, seed=1, logprobs=5, prompt_logprobs=3
    )
    plain = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=1)
    several = prompts(16)
    outputs = llm.generate(several + several, [wanted] * 16 + [plain] * 16, use_tqdm=False)
    for output, other in zip(outputs[:16], outputs[16:], strict=True):
        part, ids = output.outputs[0], output.prompt_token_ids
        assert part.token_ids == other.outputs[0].token_ids
        assert (other.prompt_logprobs, other.outputs[0].logprobs) == (None, None)
        assert output.num_cached_tokens == 0
        expected = peer_logprobs(peer, ids + part.token_ids)
        assert output.prompt_logprobs is not None
        assert part.logprobs is not None
        assert len(output.prompt_logprobs) == len(ids)
        assert len(part.logprobs) == len(part.token_ids) == 40
        assert output.prompt_logprobs[0] is None
        for i in range(1, len(ids)):
            shown = output.prompt_logprobs[i]
            assert shown is not None
            check_position(shown, ids[i], expected[i - 1], 3)
        for i, shown in enumerate(part.logprobs):
            check_position(shown, part.token_ids[i], expected[len(ids) + i - 1], 5)
        total = sum(shown[token].logprob for shown, token in zip(part.logprobs, part.token_ids, strict=True))
        assert part.cumulative_logprob == pytest.approx(total)
    assert llm.generate(several[1], plain, use_tqdm=False)[0].num_cached_tokens  # they filled the cache


def test_logprobs_of_given_tokens(llm: LLM, peer: Any) -> None:
    output = run(llm, [1, 2, 3], logprob_token_ids=[7, 0, 260], max_tokens=5)
    part = output.outputs[0]
    expected = peer_logprobs(peer, [1, 2, 3, *part.token_ids])
    assert part.logprobs is not None
    for i, shown in enumerate(part.logprobs):
        assert list(shown) == list(dict.fromkeys([part.token_ids[i], 7, 0, 260]))
        for token, entry in shown.items():
            assert abs(entry.logprob - float(expected[2 + i][token])) < 1e-4
            assert entry.rank == int((expected[2 + i] > expected[2 + i][token]).sum()) + 1


def test_no_more_than_the_chosen_token(llm: LLM) -> None:
    part = run(llm, [1, 2, 3], logprobs=0).outputs[0]
    assert part.logprobs is not None
    assert [list(shown) for shown in part.logprobs] == [[token] for token in part.token_ids]


def test_flat_logprobs_are_the_same(llm: LLM) -> None:
    wanted = {"logprobs": 2, "prompt_logprobs": 1}
    plain, flat = run(llm, [1, 2, 3], **wanted), run(llm, [1, 2, 3], flat_logprobs=True, **wanted)
    assert isinstance(flat.prompt_logprobs, FlatLogprobs)
    assert isinstance(flat.outputs[0].logprobs, FlatLogprobs)
    assert list(flat.outputs[0].logprobs) == plain.outputs[0].logprobs
    assert [position or None for position in flat.prompt_logprobs] == plain.prompt_logprobs


def test_decoded_tokens_of_several_completions(llm: LLM) -> None:
    output = run(llm, "水車", n=3, logprobs=1, prompt_logprobs=0, seed=9)
    pieces = [next(iter(shown.values())) for shown in (output.prompt_logprobs or [])[1:] if shown]
    assert "".join(piece.decoded_token or "" for piece in pieces).endswith("車")
    solo = [run(llm, "水車", logprobs=1, seed=9 + i).outputs[0] for i in range(3)]
    for part, alone in zip(output.outputs, solo, strict=True):
        assert part.token_ids == alone.token_ids
        texts = [
            [(token, entry.decoded_token) for shown in each.logprobs or [] for token, entry in shown.items()]
            for each in (part, alone)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_a_stop_string_and_each_kind_of_output(llm: LLM, kind: RequestOutputKind) -> None:
    params = SamplingParams(
        seed=3,
        max_tokens=60,
        logprobs=1,
        prompt_logprobs=0,
        stop=["c"],
        allowed_token_ids=llm.get_tokenizer().encode("abc"),
        output_kind=kind,
    )
    whole = llm.generate([5, 6], params, use_tqdm=False)[0].outputs[0]
    assert whole.finish_reason == "stop"

    async def read() -> list[RequestOutput]:
        return [output async for output in llm._engine.generate([5, 6], params, "x")]

    outputs = asyncio.run_coroutine_threadsafe(read(), llm._loop).result(30)
    parts = [output.outputs[0] for output in outputs]
    if kind is RequestOutputKind.DELTA:
        assert [entry for part in parts for entry in part.logprobs or []] == whole.logprobs
        assert [len(part.token_ids) for part in parts] == [len(part.logprobs or []) for part in parts]
        assert [output.prompt_logprobs is None for output in outputs] == [False] + [True] * (len(outputs) - 1)
    else:
        assert parts[-1].logprobs == whole.logprobs
        assert all(output.prompt_logprobs for output in outputs)
    assert len(whole.logprobs or []) == len(whole.token_ids)
    assert parts[-1].cumulative_logprob == pytest.approx(whole.cumulative_logprob)


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


# --- beam search -----------------------------------------------------------------------------------------


def reference_beams(peer: Any, prompt: list[int], width: int, length: int, penalty: float) -> list[list[int]]:
    """The same search, plainly, on the peer's own logits."""
    beams, done = [(0.0, prompt)], list[tuple[float, list[int]]]()

    def score(beam: tuple[float, list[int]]) -> float:
        return beam[0] / float((len(beam[1]) - (beam[1][-1] == 257)) ** penalty)

    for _ in range(length):
        grown = []
        for total, tokens in beams:
            with torch.inference_mode():
                logprobs = peer(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)
            for value, token in zip(*logprobs.topk(2 * width), strict=True):
                grown.append((total + float(value), [*tokens, int(token)]))
        done += [beam for beam in grown if beam[1][-1] == 257]
        beams = sorted((beam for beam in grown if beam[1][-1] != 257), key=score, reverse=True)[:width]
    return [tokens for _, tokens in sorted(done + beams, key=score, reverse=True)[:width]]


@pytest.mark.parametrize("penalty", [0.0, 1.0, 4.0])
def test_beam_search_finds_what_a_plain_search_finds(llm: LLM, peer: Any, penalty: float) -> None:
    prompts = [[5, 6, 7], list(b"the mill turns")]
    params = BeamSearchParams(beam_width=4, max_tokens=6, length_penalty=penalty)
    outputs = llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert [beam.tokens for beam in output.sequences] == reference_beams(peer, prompt, 4, 6, penalty)
        for beam in output.sequences:
            assert len(beam.logprobs) == len(beam.tokens) - len(prompt)
            chosen = zip(beam.logprobs, beam.tokens[len(prompt) :], strict=True)
            assert beam.cum_logprob == pytest.approx(sum(at[token].logprob for at, token in chosen))
            assert (beam.finish_reason == "stop") == (beam.tokens[-1] == 257)


def test_beams_are_those_of_transformers(llm: LLM, peer: Any) -> None:
    """Where both score alike: without a penalty for length, of which transformers leaves out the prompt."""
    prompts = [[5, 6, 7], list(b"the mill turns"), [200, 3]]
    params = BeamSearchParams(beam_width=4, max_tokens=8, length_penalty=0.0)
    outputs = llm.beam_search([{"prompt_token_ids": prompt} for prompt in prompts], params)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = peer.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=8,
            length_penalty=0.0,
            do_sample=False,
            early_stopping=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = [beam.tokens + [0] * (len(prompt) + 8 - len(beam.tokens)) for beam in output.sequences]
        assert (
            found
            == torch.nn.functional.pad(
                expected.sequences, (0, len(found[0]) - expected.sequences.shape[1])
            ).tolist()
        )
        scores = [beam.cum_logprob for beam in output.sequences]
        assert scores == pytest.approx(expected.sequences_scores.tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("beam_width", 0), ("beam_width", 2.5), ("max_tokens", 0), ("temperature", 3), ("length_penalty", "a")],
)
def test_bad_beam_search_parameters(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, name: value})


def test_beam_search_beyond_the_engine(llm: LLM) -> None:
    with pytest.raises(RequestError, match="logprobs"):
        llm.beam_search("a", BeamSearchParams(beam_width=11, max_tokens=3))
    with pytest.raises(RequestError, match="structured_outputs"):
        BeamSearchParams(beam_width=2, max_tokens=3, structured_outputs=object())
    with pytest.raises(RequestError, match="pooling"):
        llm.score("a", "b")
