"""With `batch_invariant=True` a request's logprobs are the same bits in any company, cut up in any way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from headrace import LLM, AsyncEngineArgs, ConfigError, SamplingParams
from headrace.frontend import engine_args
from headrace.frontend.outputs import RequestOutput

from tests.integration.tiny_llama import save_with_tokenizer, tiny_llama

RNG = random.Random(7)
STEM = [RNG.randrange(256) for _ in range(40)]
PROMPTS = [
    (STEM if i % 3 else []) + [RNG.randrange(256) for _ in range(RNG.choice([1, 5, 30, 90]))]
    for i in range(128)
]
LONG = [RNG.randrange(256) for _ in range(560)]
"""More keys than the attention takes at a time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_with_tokenizer(tiny_llama(), folder)
    return folder


@pytest.fixture(params=["float32", "bfloat16"], scope="module")
def engines(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[LLM, LLM]]:
    """One that cuts prompts small and preempts, and one that does neither."""
    common: dict[str, Any] = {"dtype": request.param, "batch_invariant": True, "block_size": 4}
    common |= {"max_num_seqs": 9 + len(PROMPTS)}
    small = {"max_num_batched_tokens": 61, "num_gpu_blocks_override": 290}
    wide = {"num_gpu_blocks_override": 5000, "enable_prefix_caching": False}
    with LLM(str(folder), **common, **small) as first, LLM(str(folder), **common, **wide) as second:
        yield first, second


def run(llm: LLM, prompts: list[list[int]]) -> list[RequestOutput]:
    params = [
        SamplingParams(
            seed=len(prompt),
            max_tokens=24,
            ignore_eos=True,
            logprobs=3,
            prompt_logprobs=0 if i % 4 == 0 else None,
        )
        for i, prompt in enumerate(prompts)
    ]
    return llm.generate(prompts, params, use_tqdm=False)


def bits(output: RequestOutput) -> tuple[list[int], list[list[tuple[int, float]]]]:
    """The tokens, and the exact logprobs of each."""
    part = output.outputs[0]
    shown = part.logprobs or []
    return part.token_ids, [[(token, entry.logprob) for token, entry in here.items()] for here in shown]


def test_the_same_bits_in_any_company(engines: tuple[LLM, LLM]) -> None:
    small, wide = engines
    alone = [bits(run(wide, [prompt])[0]) for prompt in [*PROMPTS[:8], LONG]]
    for company, repeats in ((1, 2), (8, 2), (44, 1), (128, 1)):
        for repeat in range(repeats):
            others = PROMPTS[len(PROMPTS) - company :]
            for llm in (small, wide):
                together = run(llm, [*PROMPTS[:8], LONG, *others])
                assert [bits(output) for output in together[:9]] == alone, (company, repeat)
    preemptions = [metric for metric in small.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preemptions[0].value > 0  # type: ignore[union-attr]


def test_prompts_too(engines: tuple[LLM, LLM]) -> None:
    small, wide = engines
    crowd, alone = run(small, [LONG, *PROMPTS[:44]])[0], run(wide, [LONG])[0]
    assert crowd.prompt_logprobs == alone.prompt_logprobs


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({"tensor_parallel_size": 2}, "cpu"),
        ({"tensor_parallel_size": 2}, "cuda"),
        ({"block_size": 128}, "cpu"),
    ],
)
def test_where_it_cannot_be_promised_it_is_refused(
    folder: Path, changes: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_args, "_device", lambda: device)
    with pytest.raises(ConfigError, match="batch_invariant") as caught:
        engine_args.resolve(AsyncEngineArgs(model=str(folder), batch_invariant=True, **changes))
    assert caught.value.parameter == "batch_invariant"
