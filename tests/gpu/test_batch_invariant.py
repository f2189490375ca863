"""With `batch_invariant=True` a request's logprobs are the same bits in any company, cut up in any way."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import pytest
import torch
from headrace import LLM, ConfigError, RequestOutput, SamplingParams
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import Sampling
from headrace.kernels import fixed_order_linear
from headrace.worker.invariance import check_fixed_order
from headrace.worker.logprobs import scores_to_show

from .peers import VOCAB, make_peer, regrets, regrets_of_bfloat16
from .test_models import generate, requests_of

RNG = random.Random(7)
STEM = [RNG.randrange(VOCAB) for _ in range(40)]
PROMPTS = [
    (STEM if i % 3 else []) + [RNG.randrange(VOCAB) for _ in range(RNG.choice([1, 5, 30, 90]))]
    for i in range(128)
]
LONG = [RNG.randrange(VOCAB) for _ in range(790)]
"""Several chunks of keys, and over `max_num_batched_tokens` in one engine."""
MODELS = ["llama", "llama-80", "qwen2", "qwen3", "opt"]

Bits: TypeAlias = tuple[list[int], list[list[tuple[int, float]]]]
MakeConfig: TypeAlias = Callable[..., EngineConfig]


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peer(request.param, tmp_path_factory.mktemp("model")).folder


def start(folder: Path, **changes: Any) -> LLM:
    common: dict[str, Any] = {
        "dtype": "bfloat16",
        "batch_invariant": True,
        "skip_tokenizer_init": True,
        "max_num_seqs": 128,
        "gpu_memory_utilization": 0.2,
    }
    return LLM(str(folder), **common | changes)


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[tuple[LLM, LLM]]:
    """One that cuts prompts small and preempts, and one that does neither."""
    small = {"max_num_batched_tokens": 133, "num_gpu_blocks_override": 260}
    wide = {"max_num_batched_tokens": 8192, "num_gpu_blocks_override": 4000, "enable_prefix_caching": False}
    with start(folder, **small) as first, start(folder, **wide) as second:
        yield first, second


def run(llm: LLM, prompts: list[list[int]], plain: bool = False, max_tokens: int = 40) -> list[RequestOutput]:
    """`plain`: rows of which nothing is shown, that are sampled in graphs."""
    params = [
        SamplingParams(
            seed=len(prompt),
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            logprobs=None if plain else 3,
            prompt_logprobs=0 if i % 4 == 0 and not plain else None,
        )
        for i, prompt in enumerate(prompts)
    ]
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def bits(output: RequestOutput) -> Bits:
    """The tokens, and the exact logprobs of each."""
    part = output.outputs[0]
    shown = part.logprobs or []
    return list(part.token_ids), [[(token, entry.logprob) for token, entry in here.items()] for here in shown]


def test_the_same_bits_in_any_company(engines: tuple[LLM, LLM]) -> None:
    small, wide = engines
    alone = [bits(run(wide, [prompt])[0]) for prompt in [*PROMPTS[:8], LONG]]
    for company in (1, 8, 44, 128):
        others = PROMPTS[len(PROMPTS) - company + 1 :]
        for name, llm in (("small", small), ("wide", wide)):
            together = run(llm, [*PROMPTS[:8], LONG, *others])
            assert [bits(output) for output in together[:9]] == alone, (name, company)
    preemptions = [metric for metric in small.get_metrics() if metric.name == "vllm:num_preemptions"]
    assert preemptions[0].value > 0  # type: ignore[union-attr]


def test_plain_rows_in_graphs_too(engines: tuple[LLM, LLM]) -> None:
    """Their tokens at temperature 1: another bit of a logit changes one of them now and then."""
    alone = [bits(run(engines[1], [prompt], plain=True)[0])[0] for prompt in PROMPTS[:8]]
    for llm in engines:
        for company in (8, 40, 128):
            together = run(llm, [*PROMPTS[:8], *PROMPTS[len(PROMPTS) - company + 8 :]], plain=True)
            assert [bits(output)[0] for output in together[:8]] == alone, company


def test_prompts_too(engines: tuple[LLM, LLM]) -> None:
    small, wide = engines
    crowd, alone = run(small, [LONG, *PROMPTS[:40]])[0], run(wide, [LONG])[0]
    assert crowd.prompt_logprobs == alone.prompt_logprobs


def test_a_restarted_worker_goes_on_alike(engines: tuple[LLM, LLM]) -> None:
    small, wide = engines
    alone = [bits(run(wide, [prompt], max_tokens=200)[0]) for prompt in PROMPTS[:3]]

    def kill() -> None:
        for process in psutil.Process().children(recursive=True):
            if "headrace.worker.main:run" in process.cmdline():
                process.kill()

    timer = threading.Timer(0.15, kill)
    timer.start()
    assert [bits(output) for output in run(small, PROMPTS[:40], max_tokens=200)[:3]] == alone
    timer.join()
    assert [bits(output) for output in run(small, PROMPTS[:3], max_tokens=200)] == alone


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_greedy_tokens_are_transformers_best(name: str, tmp_path: Path, gpu_config: MakeConfig) -> None:
    peer = make_peer(name, tmp_path)
    config = gpu_config(peer.folder, max_num_seqs=48, batch_invariant=True)
    answers, _ = generate(config, requests_of(Sampling(temperature=0.0), 60), prepared=True)
    ours, theirs = regrets(peer.model, answers), regrets_of_bfloat16(peer, answers)
    assert ours.max() < max(0.15, 2 * float(theirs.max()))
    assert (ours == 0).float().mean() > (theirs == 0).float().mean() - 0.03


SHAPES = [(8, 2, 64), (12, 12, 64), (16, 2, 80), (32, 8, 128), (8, 4, 256)]
ORDERS = [(shape, dtype) for shape in SHAPES for dtype in (torch.bfloat16, torch.float16)]
# Wider heads are refused in float32: tests/worker/test_fixed_order.py
ORDERS += [(shape, torch.float32) for shape in SHAPES if shape[2] <= 128]


@pytest.mark.parametrize(("heads", "dtype"), ORDERS)
def test_this_gpu_adds_in_order(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    check_fixed_order(*heads, dtype, torch.device("cuda", 0))


def test_another_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = itertools.cycle((8, 4))
    monkeypatch.setattr(fixed_order_linear, "runs", lambda out_features, in_features: next(orders))
    with pytest.raises(ConfigError, match="batch_invariant"):
        check_fixed_order(8, 2, 64, torch.bfloat16, torch.device("cuda", 0))


def test_logprobs_of_a_row_do_not_depend_on_its_place() -> None:
    """An odd vocabulary: the rows are aligned differently."""
    row = torch.randn(5003, device="cuda")
    alone = scores_to_show(row[None], "raw_logprobs")
    together = scores_to_show(row.expand(9, -1).contiguous(), "raw_logprobs")
    assert torch.equal(together, alone.expand(9, -1))
