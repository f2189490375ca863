"""The request API in two halves: `add_request` queues, `generate(request_id)` reads.

    python examples/api_page.py [MODEL]

Queue many requests first and read them later, or read them from somewhere else; `abort_request` drops one.
`AsyncLLMEngine` is vLLM's older name of `AsyncLLM`: here they are one class.
"""

from __future__ import annotations

import asyncio
import sys

from headrace import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

PROMPTS = {"name": "Hello, my name is", "capital": "The capital of France is", "endless": "One, two, three,"}


async def main(model: str) -> None:
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=model))
    try:
        for request_id, prompt in PROMPTS.items():
            params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=24, seed=1)
            await engine.add_request(request_id=request_id, prompt=prompt, sampling_params=params)

        await engine.abort_request("endless")

        for request_id in ("capital", "name"):  # in any order: each request has a stream of its own
            async for output in engine.generate(request_id):
                text = output.outputs[0].text  # outputs are cumulative unless `output_kind` says otherwise
                if output.finished:
                    print(f"{request_id}: {PROMPTS[request_id]}{text}")
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "demo"))
