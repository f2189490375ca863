"""What HTTP costs on top of AsyncLLM: many clients stream from a model that costs nothing.

    python scripts/bench_server.py [--num-clients 1000] [--output-len 128] [--workers 1]
    python scripts/bench_server.py --compare server,async_llm

Each client sends one request and reads its stream; every token is compared with the oracle's. The clients run
in this process, on the same machine as the server. With `async_llm` they read from the engine itself.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from typing import TypeAlias

import uvloop
from benchlib.engines import random_prompt
from benchlib.harness import Figures, percentiles, run_benchmark
from benchlib.http_stream import Serving, post_stream, serving
from headrace import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams
from headrace.frontend.engine_args import resolve
from headrace.ipc.oracle import oracle_stream

Stream: TypeAlias = Callable[[list[int], int, int], AsyncIterator[list[int]]]
"""(prompt, seed, number of tokens) to token ids as they come."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-clients", type=int, default=1000)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1, help="server processes")


class Client:
    """One request, and when its tokens came."""

    def __init__(self, rng: random.Random, seed: int, args: argparse.Namespace) -> None:
        self.prompt = random_prompt(rng, args.input_len)
        self.seed = seed
        self.length = args.output_len
        self.tokens: list[int] = []
        self.begun = self.first = self.ended = 0.0

    async def run(self, stream: Stream) -> None:
        self.begun = time.perf_counter()
        async for tokens in stream(self.prompt, self.seed, self.length):
            self.first = self.first or time.perf_counter()
            self.tokens += tokens
        self.ended = time.perf_counter()

    def check(self, vocab_size: int) -> None:
        if self.tokens != oracle_stream(self.prompt, self.seed, self.length, vocab_size):
            raise SystemExit(f"client {self.seed} got other tokens than the oracle's")


async def load(stream: Stream, args: argparse.Namespace, vocab_size: int) -> Figures:
    """One client alone, then all of them together."""
    rng = random.Random(args.seed)
    alone = [Client(rng, seed, args) for seed in range(20)]
    for client in alone:
        await client.run(stream)
    together = [Client(rng, seed, args) for seed in range(args.num_clients)]
    begun = time.perf_counter()
    await asyncio.gather(*(client.run(stream) for client in together))
    seconds = time.perf_counter() - begun
    for client in [*alone, *together]:
        client.check(vocab_size)
    lone = [(client.ended - client.first) / (client.length - 1) for client in alone[5:]]
    return {
        **percentiles(
            "one client: first token", (client.first - client.begun for client in alone[5:]), (50,)
        ),
        **percentiles("one client: each further token", lone, (50,)),
        "requests/s": args.num_clients / seconds,
        "output tokens/s": args.num_clients * args.output_len / seconds,
        **percentiles("first token", (client.first - client.begun for client in together)),
        **percentiles("whole answer", (client.ended - client.begun for client in together), (50, 99)),
    }


def measure(args: argparse.Namespace) -> Figures:
    engine_args = AsyncEngineArgs(
        model=args.model, load_format="oracle", max_num_seqs=args.max_num_seqs or args.num_clients
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if args.engine == "async_llm":
            return runner.run(_direct(engine_args, args))
        words = [args.model, "--load-format", "oracle", "--workers", str(args.workers)]
        words += ["--max-num-seqs", str(engine_args.max_num_seqs)]
        with serving(words) as server:
            return runner.run(_through_http(server, args, resolve(engine_args).vocab_size))


async def _direct(engine_args: AsyncEngineArgs, args: argparse.Namespace) -> Figures:
    async with AsyncLLM.from_engine_args(engine_args) as engine:

        async def stream(prompt: list[int], seed: int, length: int) -> AsyncIterator[list[int]]:
            kind = RequestOutputKind.DELTA
            params = SamplingParams(seed=seed, max_tokens=length, ignore_eos=True, output_kind=kind)
            async for output in engine.generate({"prompt_token_ids": prompt}, params):
                yield output.outputs[0].token_ids

        return await load(stream, args, engine.config.vocab_size)


async def _through_http(server: Serving, args: argparse.Namespace, vocab_size: int) -> Figures:
    async def stream(prompt: list[int], seed: int, length: int) -> AsyncIterator[list[int]]:
        body = {"prompt": prompt, "seed": seed, "max_tokens": length, "ignore_eos": True, "stream": True}
        async with post_stream(server.port, "/v1/completions", {**body, "return_token_ids": True}) as events:
            async for chunk in events:
                if chunk.error is not None:
                    raise SystemExit(f"client {seed} got an error: {chunk.error}")
                yield chunk.choices[0].token_ids

    before = server.memory()["server"]
    most = [before]
    watching = asyncio.ensure_future(_watch(server, most))
    figures = await load(stream, args, vocab_size)
    watching.cancel()
    figures["memory of the servers before, MiB"] = before
    figures["memory of the servers at most, MiB"] = max(most)
    return figures


async def _watch(server: Serving, sizes: list[float]) -> None:
    while True:
        await asyncio.sleep(0.5)
        sizes.append(server.memory()["server"])


if __name__ == "__main__":
    run_benchmark(__doc__, measure, add_flags, engines=("server", "async_llm"))
