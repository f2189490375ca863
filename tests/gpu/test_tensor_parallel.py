"""Models over several GPUs: tokens are transformers' best on any number of ranks; a killed rank is named."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from headrace import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams
from torch import Tensor

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
GREEDY = {"temperature": 0.0}
SPECIAL = {"temperature": 1.0, "top_k": 1, "seed": 3}
"""The same tokens as greedy, by way of the logits of all ranks."""

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
    return model.float().cuda().eval()


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


async def complete(engine: AsyncLLM, prompt: list[int], max_tokens: int, **sampling: Any) -> list[int]:
    params = SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY, **sampling
    )
    async for output in engine.generate({"prompt_token_ids": prompt}, params):
        if output.finished:
            return list(output.outputs[0].token_ids)
    raise AssertionError("the stream ended without an end")


async def serve(args: AsyncEngineArgs, prompts: list[list[int]]) -> list[list[int]]:
    """Arriving a few at a time, so that steps are of all kinds, before and after graphs are recorded."""
    async with AsyncLLM.from_engine_args(args) as engine:
        tasks = []
        for number, prompt in enumerate(prompts):
            sampling = SPECIAL if number % 6 == 5 else GREEDY
            tasks.append(asyncio.create_task(complete(engine, prompt, 20 + number, **sampling)))
            if number % 4 == 3:
                await asyncio.sleep(0.5)
        return await asyncio.gather(*tasks)


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


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_transformers_best(name: str, ranks: int, tmp_path: Path) -> None:
    model, prompts = make_model(name, tmp_path), make_prompts()
    found = {}
    for size in (1, ranks):
        answers = asyncio.run(asyncio.wait_for(serve(engine_args(tmp_path, size), prompts), 120))
        found[size] = answers, regrets(model, prompts, answers)
    (alone, expected), (ours, regret) = found[1], found[ranks]
    same = sum(a == b for a, b in zip(alone, ours, strict=True))
    print(
        f"{name}, {ranks} ranks: {same} of {len(ours)} streams as on one; best token of transformers in "
        f"{(regret == 0).float().mean():.4f} ({(expected == 0).float().mean():.4f} on one), "
        f"worst regret {regret.max():.4f} ({expected.max():.4f})"
    )
    assert regret.max() < max(0.15, 2 * float(expected.max()))
    assert (regret == 0).float().mean() > (expected == 0).float().mean() - 0.03


@pytest.mark.parametrize("ranks", RANKS)
def test_a_killed_rank_is_named_and_replaced(ranks: int, tmp_path: Path) -> None:
    model, prompt = make_model("llama", tmp_path), make_prompts()[3]

    async def main() -> list[int]:
        async with AsyncLLM.from_engine_args(engine_args(tmp_path, ranks)) as engine:
            task = asyncio.create_task(complete(engine, prompt, 900, **GREEDY))
            await asyncio.sleep(0.2)
            victim = psutil.Process(engine._client.info.pid).children()[-1]
            os.kill(victim.pid, signal.SIGKILL)
            unhealthy = ""
            while not unhealthy:  # its peers spin in their kernels, and are ended all the same
                unhealthy = (await engine._client.call("ping")).unhealthy
            assert f"worker {ranks - 1}, in phase 'serving'" in unhealthy
            return await task

    tokens = asyncio.run(asyncio.wait_for(main(), 120))
    assert len(tokens) == 900
    regret = regrets(model, [prompt], [tokens])
    print(f"{ranks} ranks, one killed: worst regret {regret.max():.4f}")
    assert regret.max() < 0.5
