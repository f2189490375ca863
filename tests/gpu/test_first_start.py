"""Where nothing has been compiled yet, requests wait for kernels, and the engine is healthy meanwhile."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
import triton
from headrace import AsyncEngineArgs, AsyncLLM, SamplingParams
from headrace.frontend.engine_args import resolve
from headrace.worker.compiling import STEP, Compiler
from headrace.worker.cuda_runner import CudaRunner

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
CROWDS = (1, 3, 12, 40, 100)
"""Requests at once: products of each size have kernels of their own."""


async def complete(engine: AsyncLLM, number: int) -> int:
    params = SamplingParams(max_tokens=8, ignore_eos=True, top_p=0.9 if number % 3 == 2 else 1.0)
    async for output in engine.generate({"prompt_token_ids": [5] * (10 + number)}, params):
        if output.finished:
            return len(output.outputs[0].token_ids)
    raise AssertionError("the stream ended without an end")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_compiling_is_progress(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ranks > torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    args = AsyncEngineArgs(
        model=str(tmp_path),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=128,
        kv_cache_memory_bytes=1 << 28,
        tensor_parallel_size=ranks,
        hang_seconds=4,
    )

    async def main() -> None:
        async with AsyncLLM.from_engine_args(args) as engine:
            for size in CROWDS:  # at once: nothing is prepared in idle moments
                tasks = [asyncio.create_task(complete(engine, number)) for number in range(size)]
                while not all(task.done() for task in tasks):
                    await engine.check_health()
                    await asyncio.sleep(0.05)
                assert await asyncio.gather(*tasks) == [8] * size
            stats, _ = await engine.get_stats()
            assert stats.num_restarts == 0

    asyncio.run(asyncio.wait_for(main(), 200))


def test_kernels_are_compiled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    for hook in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(triton.knobs.runtime, hook, None)
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    args = AsyncEngineArgs(
        model=str(tmp_path),
        load_format="dummy",
        skip_tokenizer_init=True,
        max_num_seqs=40,
        kv_cache_memory_bytes=1 << 28,
    )
    told: list[str] = []
    runner = CudaRunner(resolve(args), 0, "", Compiler(told.append))
    runner.load(lambda phase: None)
    runner.allocate(1000, 1024)
    runner.warm_up()
    assert set(told) == {STEP, ""}
    while runner.idle():
        pass
    assert set(told) == {STEP, "", "_forbid_kernel"}
