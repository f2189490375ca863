"""Streams answers token by token through AsyncLLM.

    python examples/async_streaming.py [--model MODEL] [--prompt TEXT]...

Five steps: describe the engine, start it, say how to sample, read the stream, let go of the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import time

from headrace import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams

PROMPTS = (
    "The future of artificial intelligence is",
    "In a galaxy far, far away",
    "The key to happiness is",
)


async def stream_answer(engine: AsyncLLM, prompt: str, request_id: str, max_tokens: int) -> float:
    """Print the answer as it grows; returns when its first token came, as seconds since the epoch."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.8,
        top_p=0.95,
        seed=42,  # the same text every time, whatever else the engine is doing
        output_kind=RequestOutputKind.DELTA,  # each output holds only what is new
    )
    first_token = 0.0
    print(f"\n> {prompt}")
    async for output in engine.generate(prompt, params, request_id):
        first_token = first_token or time.time()
        print(output.outputs[0].text, end="", flush=True)
        if output.finished:
            print(f"\n[{output.outputs[0].finish_reason}]")
    return first_token


async def main(args: argparse.Namespace) -> None:
    print(f"starting {args.model} ...", flush=True)
    # Leaving the `async with` block shuts the engine down, however it is left; so does `engine.shutdown()`.
    async with AsyncLLM.from_engine_args(AsyncEngineArgs(model=args.model)) as engine:
        first_tokens = [
            await stream_answer(engine, prompt, f"stream-{number}", args.max_tokens)
            for number, prompt in enumerate(args.prompt or PROMPTS)
        ]
    print(f"\nfirst token after {first_tokens[0] - args.since:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo", help="a folder, a .gguf file, a Hugging Face id or `demo`")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--since", type=float, default=time.time(), help="the start of the clock, Unix time")
    asyncio.run(main(parser.parse_args()))
