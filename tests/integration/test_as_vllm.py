"""Programs written against vLLM's module paths, run unchanged on the demo model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = "somebody/some-model-1b"

STREAMING = """
import asyncio

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM


async def deltas(engine: AsyncLLM, prompt: str, name: str) -> list[str]:
    params = SamplingParams(
        max_tokens=12, temperature=0.8, top_p=0.95, seed=42, output_kind=RequestOutputKind.DELTA
    )
    pieces = []
    async for output in engine.generate(request_id=name, prompt=prompt, sampling_params=params):
        pieces += [completion.text for completion in output.outputs]
        if output.finished:
            break
    return pieces


async def main() -> None:
    args = AsyncEngineArgs(model="somebody/some-model-1b", enforce_eager=True)
    engine = AsyncLLM.from_engine_args(args, usage_context=UsageContext.ENGINE_CONTEXT)
    try:
        for name in ("first", "second"):
            pieces = await deltas(engine, "In a galaxy far, far away", name)
            print(len(pieces) > 1, "".join(pieces))
    finally:
        engine.shutdown()


asyncio.run(main())
"""

TWO_HALVES = """
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.inputs import TokensPrompt
from vllm.sampling_params import SamplingParams

engine = AsyncLLMEngine.from_engine_args(
    AsyncEngineArgs(model="somebody/some-model-1b", tensor_parallel_size=1)
)
greedy = SamplingParams(temperature=0, max_tokens=8)
await engine.add_request(request_id="text", prompt="The capital of France is", sampling_params=greedy)
partial = 0
async for output in engine.generate("text"):
    if output.finished:
        print(repr(output.outputs[0].text))
    else:
        partial += 1
print(partial > 0)

ids = output.prompt_token_ids
await engine.add_request("ids", TokensPrompt(prompt_token_ids=ids), greedy)
async for again in engine.generate("ids"):
    pass
print(again.outputs[0].token_ids == output.outputs[0].token_ids)
await engine.abort_request("nothing-of-that-name")
"""


def as_vllm(program: str, folder: Path) -> list[str]:
    """What it prints; it must end well and leave nothing to complain of."""
    script = folder / "program.py"
    script.write_text(program)
    command = [sys.executable, "-c", "from headrace.frontend.cli import main; main()", "as-vllm"]
    command += ["--model-map", f"{MODEL}=demo", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_streaming(tmp_path: Path) -> None:
    first, second = as_vllm(STREAMING, tmp_path)
    assert first == second
    assert first.startswith("True ")


def test_two_halves_with_await_at_top_level(tmp_path: Path) -> None:
    text, partial, same = as_vllm(TWO_HALVES, tmp_path)
    assert "Paris" in text
    assert (partial, same) == ("True", "True")
