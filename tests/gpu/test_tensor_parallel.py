"""Models over several GPUs: tokens are transformers' best on any number of ranks, special samples are those
of one GPU, and a rank that fails is named and replaced.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import psutil
import pytest
import torch
import transformers
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from headrace.worker.fused import HALVED_FROM
from torch import Tensor

T = TypeVar("T")
VOCAB = 1003
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # four ranks share them
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OPT_ONLY: dict[str, Any] = {"ffn_dim": 1408, "word_embed_proj_dim": 512}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", BASE),
    "qwen3": ("Qwen3", BASE | {"head_dim": 128}),
    "opt": ("OPT", {k: v for k, v in BASE.items() if "key_value" not in k and k != "head_dim"} | OPT_ONLY),
    "llama-mlp-bias": ("Llama", BASE | {"mlp_bias": True}),  # not fused: its plain forward runs over NCCL
}
GREEDY: dict[str, Any] = {"temperature": 0.0}
SPECIAL = {"temperature": 1.0, "top_k": 1, "seed": 3}
"""The same tokens as greedy, by way of the logits of all ranks."""

FORCED: dict[str, Any] = {"logit_bias": {17: 100.0}}
WISHES: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 2, **FORCED},
    {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3, "logprobs": 1, **FORCED},
    {"temperature": 0.7, "seed": 6, "top_k": 5, "top_p": 0.9, "allowed_token_ids": [17], "logprobs": 0},
    {"temperature": 1.0, "seed": 7, "frequency_penalty": 0.5, "presence_penalty": 0.5, **FORCED},
    {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": [17], "allowed_token_ids": [17, 18], **FORCED},
)
"""Tokens settled by a rule and not by near-ties. All of them take the logits of all ranks."""
FAULTY_SITE = Path(__file__).parents[1] / "faulty_site"
FAULTS = {
    signal.SIGKILL: "worker {last}, in phase 'serving'",
    signal.SIGUSR2: "worker {last}, in phase",
    signal.SIGRTMIN: "s, because of worker {last}",
}
"""A signal to the last rank, and what the core says of it: killed; raises; hangs (`faulty_site`)."""

pytestmark = [
    pytest.mark.multi_gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
RANKS = [
    pytest.param(
        size, marks=pytest.mark.skipif(torch.cuda.device_count() < size, reason=f"needs {size} GPUs")
    )
    for size in (2, 4)
]


class Said(NamedTuple):
    """What an engine said."""

    tokens: list[list[int]]
    """For each of `make_prompts`."""
    special: list[RequestOutput]
    """Each of WISHES for some of them."""


class Checkpoint(NamedTuple):
    """A random model, transformers' float32 of it, and what it says on one GPU."""

    name: str
    folder: Path
    model: Any
    alone: Said


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("model")
    model = make_model(request.param, folder)
    return Checkpoint(request.param, folder, model, run(serve(engine_args(folder, 1))))


@pytest.fixture(scope="module", params=RANKS)
def spread(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> tuple[int, Said]:
    """How many GPUs, and what the model says on them."""
    return request.param, run(serve(engine_args(checkpoint.folder, request.param)))


def run(work: Coroutine[Any, Any, T], seconds: float = 120) -> T:
    return asyncio.run(asyncio.wait_for(work, seconds))


def make_model(name: str, folder: Path) -> Any:
    """A random checkpoint in `folder`; transformers' model of it in float32."""
    family, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**options, dtype="bfloat16")
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_norm = "norm" in parameter_name and parameter_name.endswith("weight")
            noise = torch.randn_like(parameter, dtype=torch.float32) * (0.2 if is_norm else 0.05) + is_norm
            parameter.copy_(noise.bfloat16())
    model.to(torch.bfloat16).save_pretrained(folder)
    # Read again: the conversion has rounded this one's rotary frequencies, too.
    return type(model).from_pretrained(folder, dtype=torch.float32).cuda().eval()


def make_prompts() -> list[list[int]]:
    rng = random.Random(1)
    lengths = [1, 2, 17, 64, 300, 33, 100, 5, 16, 15, 700, 40]
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths * 2]


def engine_args(folder: Path, ranks: int, **changes: Any) -> AsyncEngineArgs:
    options: dict[str, Any] = {
        "model": str(folder),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 1 << 28,
        "tensor_parallel_size": ranks,
    }
    return AsyncEngineArgs(**options | changes)


async def complete(
    engine: AsyncLLM, prompt: list[int], max_tokens: int, begun: asyncio.Event | None = None, **sampling: Any
) -> list[int]:
    """The answer; sets `begun` when the first of it comes."""
    params = SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.DELTA, **sampling
    )
    tokens: list[int] = []
    async for output in engine.generate({"prompt_token_ids": prompt}, params):
        tokens += output.outputs[0].token_ids
        if begun is not None:
            begun.set()
    return tokens


async def serve(args: AsyncEngineArgs) -> Said:
    """Requests come a few at a time, so that steps are of all kinds, before and after graphs are recorded."""
    async with AsyncLLM.from_engine_args(args) as engine:
        tasks = []
        for number, prompt in enumerate(make_prompts()):
            sampling = SPECIAL if number % 6 == 5 else GREEDY
            tasks.append(asyncio.create_task(complete(engine, prompt, 20 + number, **sampling)))
            if number % 4 == 3:
                await asyncio.sleep(0.5)
        tokens = await asyncio.gather(*tasks)
        wishes = [ask(engine, prompt, wish) for prompt in make_prompts()[:10] for wish in WISHES]
        return Said(tokens, await asyncio.gather(*wishes))


async def ask(engine: AsyncLLM, prompt: list[int], wish: dict[str, Any]) -> RequestOutput:
    params = SamplingParams(max_tokens=24, output_kind=RequestOutputKind.FINAL_ONLY, **wish)
    async for output in engine.generate({"prompt_token_ids": prompt}, params):
        if output.finished:
            return output
    raise AssertionError("the stream ended without an end")


@torch.no_grad()
def regrets(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
    """By how much transformers' best logit exceeds that of the token that we took, in standard deviations."""
    found: list[Tensor] = []
    for prompt, tokens in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + tokens], device="cuda")
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        taken = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        found.append((logits.max(-1).values - taken) / logits.std(-1))
    return torch.cat(found)


@torch.no_grad()
def near_tie(model: Any, prompt: list[int], one: list[int], other: list[int]) -> str:
    """Where two answers part, and what transformers thinks of either token there; empty if they do not."""
    place = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if place is None:
        return ""
    found = [float(regrets(model, [prompt], [answer[: place + 1]])[-1]) for answer in (one, other)]
    told = f"token {place} is {one[place]} or {other[place]}, regrets {found[0]:.4f} and {found[1]:.4f}"
    assert abs(found[0] - found[1]) < 0.5, told
    return told


def test_tokens_are_transformers_best(checkpoint: Checkpoint, spread: tuple[int, Said]) -> None:
    (name, _, model, (alone, _)), (ranks, (ours, _)) = checkpoint, spread
    prompts = make_prompts()
    expected, regret = regrets(model, prompts, alone), regrets(model, prompts, ours)
    same = sum(a == b for a, b in zip(alone, ours, strict=True))
    print(
        f"{name}, {ranks} ranks: {same} of {len(ours)} streams as on one; best token of transformers in "
        f"{(regret == 0).float().mean():.4f} ({(expected == 0).float().mean():.4f} on one), "
        f"worst regret {regret.max():.4f} ({expected.max():.4f})"
    )
    for prompt, one, other in zip(prompts, alone, ours, strict=True):
        if told := near_tie(model, prompt, one, other):
            print(f"  prompt of {len(prompt)}: {told}")
    assert regret.max() < max(0.15, 2 * float(expected.max()))
    assert (regret == 0).float().mean() > (expected == 0).float().mean() - 0.03


def test_special_samples_are_those_of_one_gpu(checkpoint: Checkpoint, spread: tuple[int, Said]) -> None:
    ranks, said = spread
    compared, worst = 0, 0.0
    for one, other in zip(checkpoint.alone.special, said.special, strict=True):
        (expected,), (found,) = one.outputs, other.outputs
        assert found.token_ids == expected.token_ids
        assert found.finish_reason == expected.finish_reason
        for theirs, mine in zip(logprobs_of(one), logprobs_of(other), strict=True):
            common = theirs.keys() & mine.keys()  # near-ties among the likeliest may swap
            assert common
            worst = max(worst, *(abs(theirs[token].logprob - mine[token].logprob) for token in common))
            compared += len(common)
    print(f"{checkpoint.name}, {ranks} ranks: {compared} logprobs, at most {worst:.4f} from one GPU's")
    assert compared > 300
    assert worst < 0.5


def long_prompts() -> tuple[list[list[int]], dict[str, Any]]:
    """Of a step that is computed in halves, and the limits of an engine that takes them all in one."""
    rng, count = random.Random(2), HALVED_FROM // 400 + 1
    limits = {"max_num_seqs": count, "max_num_batched_tokens": 400 * count, "enable_prefix_caching": False}
    return [[rng.randrange(VOCAB) for _ in range(400)] for _ in range(count)], limits


@pytest.mark.parametrize("ranks", RANKS)
def test_prompts_are_computed_in_halves(ranks: int, tmp_path: Path) -> None:
    """Of the largest steps one half's sums are under way beside the other's products.

    The tokens' logprobs are as near to float32's as transformers' own in bfloat16.
    """
    model, (prompts, limits) = make_model("llama", tmp_path), long_prompts()
    count, args = len(prompts), engine_args(tmp_path, ranks, **limits)

    async def main() -> list[RequestOutput]:
        async with AsyncLLM.from_engine_args(args) as engine:
            await engine.pause_generation()
            tasks = [asyncio.create_task(ask(engine, prompt, GREEDY | {"logprobs": 0})) for prompt in prompts]
            while (await engine.get_stats())[0].num_waiting < count:
                pass
            await engine.resume_generation()  # all of them in one step
            return await asyncio.gather(*tasks)

    ours, theirs = logprob_errors(model, tmp_path, run(main()))
    shares = ours.new_tensor([0.5, 0.99, 1.0])
    found, expected = ours.quantile(shares).tolist(), theirs.quantile(shares).tolist()
    print(
        f"{ranks} ranks, prompts in halves, errors of logprobs, p50 p99 max:", *found, "bfloat16:", *expected
    )
    assert len(ours) == 24 * count
    assert found[0] < 1.5 * expected[0]
    assert found[1] < 1.5 * expected[1]


@torch.no_grad()
def logprob_errors(model: Any, folder: Path, outputs: list[RequestOutput]) -> tuple[Tensor, Tensor]:
    """How far generated tokens' logprobs are from float32's: ours, and transformers' own in bfloat16."""
    bfloat16 = type(model).from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for output in outputs:
        prompt = len(output.prompt_token_ids or ())
        tokens = [*(output.prompt_token_ids or ()), *output.outputs[0].token_ids]
        ids = torch.tensor([tokens], device="cuda")
        exact, rounded = (
            each(ids)
            .logits[0, prompt - 1 : -1]
            .float()
            .log_softmax(-1)
            .gather(1, ids[0, prompt:, None])[:, 0]
            for each in (model, bfloat16)
        )
        said = [each[token].logprob for token, each in zip(tokens[prompt:], logprobs_of(output), strict=True)]
        ours.append((torch.tensor(said, device="cuda") - exact).abs())
        theirs.append((rounded - exact).abs())
    return torch.cat(ours), torch.cat(theirs)


def logprobs_of(output: RequestOutput) -> list[dict[int, Any]]:
    """Of the prompt's tokens and of the sampled ones."""
    found: list[Any] = [*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_that_fails_is_named_and_replaced(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{FAULTY_SITE}{os.pathsep}{path}" if path else str(FAULTY_SITE))
    model, prompt = make_model("llama", tmp_path), make_prompts()[3]
    args = engine_args(tmp_path, ranks, enable_prefix_caching=False, max_replays=10)

    async def main() -> None:
        async with AsyncLLM.from_engine_args(args) as engine:
            expected = await complete(engine, prompt, 900, **GREEDY)
            for how, words in FAULTS.items():
                words = words.format(last=ranks - 1)
                tokens, trouble, seconds = await break_rank(engine, prompt, how, words)
                assert words in trouble
                assert len(tokens) == 900
                assert regrets(model, [prompt], [tokens]).max() < 0.5
                told = near_tie(model, prompt, expected, tokens) or "the tokens of an undisturbed run"
                print(f"{ranks} ranks, {how.name}: noticed after {seconds:.2f} s: {trouble!r}; {told}")
            assert {host for rank in await pids(engine) for host in listens_at(rank)} <= {"127.0.0.1", "::1"}

    run(main(), 200)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_that_dies_amid_long_prompts_is_replaced(ranks: int, tmp_path: Path) -> None:
    """Its peers' streams wait for what it was to send, and are ended all the same."""
    model, (prompts, limits) = make_model("llama", tmp_path), long_prompts()
    args = engine_args(tmp_path, ranks, **limits, max_replays=10)

    async def main() -> tuple[list[list[int]], int]:
        async with AsyncLLM.from_engine_args(args) as engine:

            async def waves(count: int) -> list[list[int]]:
                """Answers of two tokens, so that prompts are what takes the time."""
                return [
                    answer
                    for _ in range(count)
                    for answer in await asyncio.gather(*(complete(engine, p, 2, **GREEDY) for p in prompts))
                ]

            answers = await waves(1)
            for _ in range(3):
                pid, task = (await pids(engine))[-1], asyncio.create_task(waves(40))
                await asyncio.sleep(random.uniform(0.05, 0.3))
                assert not task.done()
                os.kill(pid, signal.SIGKILL)
                answers += await task
            return answers, (await engine.get_stats())[0].num_restarts

    answers, num_restarts = run(main(), 200)
    assert num_restarts == 3
    assert len(answers) == 121 * len(prompts)
    distinct = {(number % len(prompts), *answer) for number, answer in enumerate(answers)}
    taken = regrets(model, [prompts[number] for number, *_ in distinct], [answer for _, *answer in distinct])
    assert taken.max() < 0.5


async def break_rank(
    engine: AsyncLLM, prompt: list[int], how: signal.Signals, words: str
) -> tuple[list[int], str, float]:
    """An answer in the middle of which the last rank fails; what the core says of it, and when, in seconds.

    Its peers spin in their kernels, and are ended all the same. Waits for `words`, or half a minute.
    """
    pid = (await pids(engine))[-1]
    begun = asyncio.Event()
    task = asyncio.create_task(complete(engine, prompt, 900, begun, **GREEDY))
    await begun.wait()
    began, trouble = time.monotonic(), ""
    os.kill(pid, how)
    while words not in trouble and time.monotonic() < began + 30:
        trouble = await trouble_of(engine) or trouble
    seconds = time.monotonic() - began
    return await task, trouble, seconds


async def pids(engine: AsyncLLM) -> list[int]:
    """Of the ranks."""
    return [cast(int, rank["pid"]) for rank in await engine.collective_rpc("rank")]


def listens_at(pid: int) -> set[str]:
    """Addresses of this host at which a process can be reached over TCP."""
    connections = psutil.Process(pid).net_connections("tcp")
    return {each.laddr[0] for each in connections if each.status == psutil.CONN_LISTEN}


async def trouble_of(engine: AsyncLLM) -> str:
    """Why the core says that requests make no progress; empty when they do."""
    trouble: str = (await engine._client.call("ping")).unhealthy
    return trouble
