"""How the engine's own cost grows with the number of streams: 1 to 1024 and beyond.

    python scripts/bench_scaling.py [--streams 1,4,16,64,256,1024] [--step-ms 10] [--frontends 4]

For each number of concurrent streams: tokens/s, CPU per token in the frontend, the core and the worker, and
the time between two outputs at the reader (ITL). The oracle answers at once, so the slowest process sets the
pace; with `--step-ms` each step lasts at least so long, as a model's would: what ITL has beyond it is ours.
`--frontends N` spreads the streams over N processes that are attached to one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvloop
from bench_oracle import cpu_seconds
from benchlib.engines import random_prompt
from benchlib.harness import Figures, percentiles
from headrace import AsyncEngineArgs, AsyncLLM, RequestOutputKind, SamplingParams

_SLOTS = 1024
_CONTEXT = 4096


@dataclass
class Window:
    """What is counted while all streams that can run do: from a tenth of stream 0 to nine tenths of it."""

    is_open: bool = False
    tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    """Seconds between two outputs of a stream."""
    began: float = 0.0
    ended: float = 0.0
    cpu: list[dict[str, float]] = field(default_factory=list)

    def turn(self) -> None:
        """Open it, or close it."""
        self.is_open = not self.is_open
        self.cpu.append(cpu_seconds())
        self.began, self.ended = self.ended, time.perf_counter()


async def stream_all(engine: AsyncLLM, count: int, length: int) -> Figures:
    """Run `count` streams of `length` tokens at once."""
    window = Window()
    turns = [length // 10, length * 9 // 10]
    rng = random.Random(0)

    async def read(number: int) -> None:
        params = SamplingParams(
            max_tokens=length, ignore_eos=True, seed=number, output_kind=RequestOutputKind.DELTA
        )
        prompt: Any = {"prompt_token_ids": random_prompt(rng, 32)}
        last, tokens = 0.0, 0
        async for output in engine.generate(prompt, params, f"{count}-{number}"):
            now = time.perf_counter()
            fresh = len(output.outputs[0].token_ids)
            tokens += fresh
            if window.is_open:
                window.tokens += fresh
                if last:
                    window.gaps.append(now - last)
            last = now
            if number == 0 and turns and tokens >= turns[0]:
                del turns[0]
                window.turn()

    await asyncio.gather(*map(read, range(count)))
    before, after = window.cpu
    seconds = window.ended - window.began
    figures = {"tokens/s": window.tokens / seconds, "tokens per output": window.tokens / len(window.gaps)}
    for role in sorted(set(before) & set(after)):
        used = after[role] - before[role]
        figures[f"{role} CPU per token, us"] = 1e6 * used / window.tokens
    return figures | percentiles("ITL", window.gaps, (50, 99))


async def measure(engine: AsyncLLM, lengths: dict[int, int]) -> dict[int, Figures]:
    """The figures of each number of streams; `lengths` has the tokens of each of them."""
    return {count: await stream_all(engine, count, length) for count, length in lengths.items()}


def make_model(folder: Path, step_seconds: float) -> str:
    """An oracle's folder, with the demo model's vocabulary."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "max_position_embeddings": _CONTEXT,
        "eos_token_id": 2,
        "oracle_step_seconds": step_seconds,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def output_len(count: int, step_ms: float) -> int:
    """Tokens of each stream, for some seconds of measurement."""
    steps = 4000 if not step_ms else round(4000 / step_ms)
    return max(500, min(_CONTEXT - 100, steps, 1_000_000 // count))


def spread(engine: AsyncLLM, count: int, length: int, frontends: int) -> Figures:
    """The same from several processes, attached to this engine's core."""
    address = engine._client._address
    words = [sys.executable, __file__, "--attach", address, "--streams", str(count // frontends)]
    words += ["--output-len", str(length)]
    before, began = cpu_seconds(), time.perf_counter()
    children = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(frontends)]
    told = [json.loads(child.communicate()[0].splitlines()[-1])["results"] for child in children]
    after, seconds = cpu_seconds(), time.perf_counter() - began
    parts: list[Figures] = [next(iter(results.values())) for results in told]
    figures: Figures = {}
    for name in ("frontend CPU per token, us", "ITL p50, ms", "ITL p99, ms"):
        figures[f"{name} (the worst)"] = max(part[name] for part in parts)
    tokens = frontends * (count // frontends) * length
    for role in ("core", "worker"):  # with start and end, so a little too much
        figures[f"{role} CPU per token, us"] = 1e6 * (after[role] - before[role]) / tokens
    return figures | {"seconds": seconds}


def print_table(results: dict[int, Figures]) -> None:
    keys = list(next(iter(results.values())))
    width = max(map(len, keys))
    print(f"{'streams':<{width}}", *(f"{count:>10}" for count in results))
    for key in keys:
        cells = [figures.get(key) for figures in results.values()]
        print(f"{key:<{width}}", *(f"{'-' if cell is None else f'{cell:,.2f}':>10}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step-ms", type=float, default=0.0)
    parser.add_argument("--streams", default="1,4,16,64,256,1024", metavar="N,N,...")
    parser.add_argument("--output-len", type=int, help="of each stream (by number and speed of the streams)")
    parser.add_argument("--frontends", type=int, default=1)
    parser.add_argument("--no-detokenize", action="store_true", help="token ids only")
    parser.add_argument("--attach", metavar="ADDRESS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    counts = [int(count) for count in args.streams.split(",")]
    lengths = {count: args.output_len or output_len(count, args.step_ms) for count in counts}
    with (
        tempfile.TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        engine = AsyncLLM(
            AsyncEngineArgs(engine_core_address=args.attach)
            if args.attach
            else AsyncEngineArgs(
                model=make_model(Path(folder), args.step_ms / 1000),
                tokenizer=None if args.no_detokenize else "demo",
                skip_tokenizer_init=args.no_detokenize,
                load_format="oracle",
                max_num_seqs=_SLOTS,
                max_num_batched_tokens=4 * _SLOTS,
                num_gpu_blocks_override=_SLOTS * _CONTEXT // 16,
            )
        )
        if args.frontends > 1:
            results = {
                count: spread(engine, count, length, args.frontends) for count, length in lengths.items()
            }
        else:
            results = runner.run(measure(engine, lengths))
        engine.shutdown()
    print_table(results)
    load = os.getloadavg()[0]
    print(
        json.dumps(
            {"benchmark": "bench_scaling", "cores": psutil.cpu_count(), "load": load, "results": results}
        )
    )


if __name__ == "__main__":
    main()
