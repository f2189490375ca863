"""Every model family through the whole engine, against transformers: the same greedy tokens, whatever the
scheduler does. Small steps force chunks, common prefixes hits, and too few blocks preemption.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from headrace import AsyncEngineArgs, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams

VOCAB = 211
NEW_TOKENS = 64
COMMON: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": 256, "eos_token_id": None}
SIZES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPT_SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(
        **COMMON, **SIZES, num_attention_heads=6, num_key_value_heads=2, rope_parameters=LLAMA3_ROPE
    ),
    "llama-mha-tied": transformers.LlamaConfig(
        **COMMON, **SIZES, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True
    ),
    "mistral": transformers.MistralConfig(
        **COMMON, **SIZES, num_attention_heads=4, num_key_value_heads=1, sliding_window=None
    ),
    "qwen2": transformers.Qwen2Config(**COMMON, **SIZES, num_attention_heads=6, num_key_value_heads=3),
    "qwen3": transformers.Qwen3Config(
        **COMMON, **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    ),
    "opt": transformers.OPTConfig(**COMMON, **OPT_SIZES, word_embed_proj_dim=48),
}


def make_peer(config: transformers.PretrainedConfig) -> Any:
    """A model whose random weights make it decide: its favourite is rarely a near-tie."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return model


def make_prompts() -> list[list[int]]:
    """Of 3 to 90 tokens; some begin alike."""
    rng = random.Random(5)
    stem = [rng.randrange(VOCAB) for _ in range(48)]
    lengths = (3, 17, 40, 64, 90)
    fresh = [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]
    return fresh + [stem + prompt[:20] for prompt in fresh]


def greedy(peer: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)  # else it takes tokens of the padding's id for padding
    with torch.inference_mode():
        tokens = peer.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
        )
    return tokens[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


async def run(args: AsyncEngineArgs, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY
    )

    async def complete(engine: AsyncLLM, prompt: list[int]) -> list[int]:
        last: RequestOutput | None = None
        async for output in engine.generate(prompt, params):
            last = output
        assert last is not None
        return last.outputs[0].token_ids

    async with AsyncLLM.from_engine_args(args) as engine:
        tokens = await asyncio.gather(*(complete(engine, prompt) for prompt in prompts))
        await engine.do_log_stats()
    return tokens


@pytest.mark.parametrize(("family", "ranks"), [*((family, 1) for family in CONFIGS), ("llama", 2)])
def test_greedy_tokens_equal_transformers(
    family: str, ranks: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peer, prompts = make_peer(CONFIGS[family]), make_prompts()
    peer.save_pretrained(tmp_path)
    args = AsyncEngineArgs(
        model=str(tmp_path),
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=192,
        block_size=8,
        max_num_batched_tokens=24,
        num_gpu_blocks_override=50,
        tensor_parallel_size=ranks,
    )
    with caplog.at_level(logging.INFO, logger="headrace"):
        tokens = asyncio.run(run(args, prompts))
    assert tokens == [greedy(peer, prompt) for prompt in prompts]
    told = re.search(r"prefix cache (\d+) of \d+, (\d+) preemptions", caplog.text)
    assert told is not None
    hits, preemptions = map(int, told.groups())
    assert hits > 0
    assert preemptions > 0
