"""Faults for minutes: every stream must be the one that an engine without faults would have given.

    python scripts/chaos.py [--seconds 120] [--streams 64] [--seed 0] [--model oracle | demo | FOLDER]
                           [--faults none | kill-worker,stop-worker,term-worker,kill-core,stop-core,term-core]

Readers stream without a pause while one process after the other is killed, terminated or stopped at random
moments, sometimes while the engine still recovers from the last time. The oracle's streams are known
beforehand; a real model's are recorded first, one by one, and asked for greedily. More than 256 streams
overload the engine. The last line is one JSON object; the exit code is 1 when a token was lost, doubled or
changed, when an engine without a fault was called unhealthy, or when a recovery (from the fault to the next
token) took longer than it may: the first start's time and two seconds, after a stop also the time until it is
noticed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    EngineUnhealthyError,
    RequestCrashedError,
    RequestOutputKind,
    SamplingParams,
)
from headrace.frontend.metrics import Counter as CounterMetric
from headrace.ipc.oracle import oracle_stream

FAULTS = ("kill-worker", "stop-worker", "term-worker", "kill-core", "stop-core", "term-core")
BAD = ("lost", "doubled", "changed", "lost blocks", "false alarms")
VOCAB_SIZE = 32000
LONGEST = 4096
ALLOWED_SECONDS = 2.0
"""Recovery may take this much longer than the first start."""
_NOTICED_SECONDS = 2.0
"""A stop is noticed after the engine's hang_seconds, give or take its looks once a second."""
_DOUBLE_FAULTS = 0.15
"""Share of faults that hit an engine which has just begun to recover."""


class Task(NamedTuple):
    """One request and what is right for it."""

    prompt: list[int]
    seed: int
    right: list[int]


@dataclass
class Record:
    """What has come to pass."""

    last_token_at: float = 0.0
    verdicts: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    recoveries: dict[str, list[float]] = field(default_factory=dict)
    num_tokens: int = 0
    is_over: bool = False
    """No more faults; readers come to their ends."""
    is_at_fault: bool = False
    """A fault was injected and the engine has not recovered."""
    num_checks: int = 0
    """Of its health while there was no fault."""

    @property
    def is_good(self) -> bool:
        return not any(self.verdicts[name] for name in BAD)


def judge(got: Sequence[int], right: Sequence[int]) -> str:
    """What is wrong with a stream, if anything."""
    if list(got) == list(right):
        return "exact"
    first = next((i for i, pair in enumerate(zip(got, right, strict=False)) if pair[0] != pair[1]), None)
    if first is None:
        return "lost" if len(got) < len(right) else "doubled"
    rest = list(right[first:])
    for distance in range(1, 65):
        if list(got[first : first + 8]) == list(right[max(first - distance, 0) :][:8]):
            return "doubled"
        if list(got[first : first + 8]) == rest[distance : distance + 8]:
            return "lost"
    return "changed"


async def read(engine: AsyncLLM, task: Task, length: int, record: Record) -> list[int]:
    """One stream; its tokens are noted as they come."""
    greedy = engine.config.load_format != "oracle"
    params = SamplingParams(
        max_tokens=length,
        seed=task.seed,
        temperature=0.0 if greedy else 1.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    tokens: list[int] = []
    async for output in engine.generate({"prompt_token_ids": task.prompt}, params):
        tokens += output.outputs[0].token_ids
        record.last_token_at = time.monotonic()
    return tokens


async def keep_reading(engine: AsyncLLM, tasks: Sequence[Task], rng: random.Random, record: Record) -> None:
    """One reader: a random request, from its first token to a random last one, again and again."""
    while not record.is_over:
        task = rng.choice(tasks)
        length = rng.randint(len(task.right) // 4, len(task.right))
        try:
            tokens = await read(engine, task, length, record)
        except RequestCrashedError:
            record.verdicts["blamed"] += 1  # faults in a row that seemed to be this request's
            continue
        record.verdicts[judge(tokens, task.right[:length])] += 1
        record.num_tokens += len(tokens)


def processes(engine_pid: int) -> tuple[psutil.Process | None, list[psutil.Process]]:
    """The engine core and its workers, as they are now."""
    for core in psutil.Process(engine_pid).children():
        with suppress(psutil.NoSuchProcess):
            if "headrace.core.main:run" in core.cmdline():
                return core, core.children()
    return None, []


def inject(fault: str, rng: random.Random) -> bool:
    """Do it, if there is a process to do it to."""
    action, _, what = fault.partition("-")
    core, workers = processes(psutil.Process().pid)
    victims = workers if what == "worker" else [core] if core is not None else []
    if not victims:
        return False
    with suppress(psutil.NoSuchProcess):
        victim = rng.choice(victims)
        {"kill": victim.kill, "stop": victim.suspend, "term": victim.terminate}[action]()
        return True
    return False


async def restarts(engine: AsyncLLM) -> tuple[float, float]:
    """Of the core, and of its workers."""
    found = {each.name: each for each in await engine.get_metrics()}
    counts = [found[f"headrace:num_{who}_restarts"] for who in ("core", "worker")]
    core, worker = (each.value for each in counts if isinstance(each, CounterMetric))
    return core, worker


async def recovered(engine: AsyncLLM, before: tuple[float, float], record: Record) -> None:
    """Returns once a token has come from an engine that was restarted since `before`."""
    while await restarts(engine) == before:  # noqa: ASYNC110 (nor does the engine)
        await asyncio.sleep(0.01)
    since = time.monotonic()
    while record.last_token_at < since:  # noqa: ASYNC110 (readers do not tell)
        await asyncio.sleep(0.002)


async def watch(engine: AsyncLLM, record: Record) -> None:
    """However much it has to do: an engine without a fault is healthy."""
    while not record.is_over:
        await asyncio.sleep(0.1)
        was_at_fault = record.is_at_fault
        try:
            await engine.check_health()
        except EngineUnhealthyError:
            record.verdicts["false alarms"] += not (was_at_fault or record.is_at_fault)
        record.num_checks += not was_at_fault


async def torment(engine: AsyncLLM, args: argparse.Namespace, rng: random.Random, record: Record) -> None:
    """One fault after the other, at random moments."""
    end = time.monotonic() + args.seconds
    while time.monotonic() < end:
        await asyncio.sleep(rng.uniform(0.05, args.pause))
        if not args.faults:
            continue
        fault = rng.choice(args.faults)
        before = await restarts(engine)
        began = time.monotonic()
        record.is_at_fault = True
        if not inject(fault, rng):
            record.is_at_fault = False
            continue
        record.injected[fault] += 1
        if not fault.startswith("stop") and rng.random() < _DOUBLE_FAULTS:
            await asyncio.sleep(rng.uniform(0.0, 0.3))
            record.injected["a second one while it recovers"] += inject(fault, rng)
            fault = "two in a row"
        await recovered(engine, before, record)
        record.recoveries.setdefault(fault, []).append(record.last_token_at - began)
        await until_healthy(engine)
        record.is_at_fault = False
    record.is_over = True


async def until_healthy(engine: AsyncLLM) -> None:
    while True:
        with suppress(EngineUnhealthyError):
            await engine.check_health()
            return
        await asyncio.sleep(0.02)


async def make_tasks(engine: AsyncLLM, count: int, length: int, rng: random.Random) -> list[Task]:
    """Requests with what is right for them."""
    vocab = engine.config.vocab_size
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(1, 100))] for _ in range(count)]
    if engine.config.load_format == "oracle":
        rights = [oracle_stream(prompt, seed, length, vocab) for seed, prompt in enumerate(prompts)]
        return [
            Task(prompt, seed, right)
            for seed, (prompt, right) in enumerate(zip(prompts, rights, strict=True))
        ]
    tasks = []
    for seed, prompt in enumerate(prompts):
        right = await read(engine, Task(prompt, seed, []), length, Record())
        tasks.append(Task(prompt, seed, right))
    return tasks


async def run(args: argparse.Namespace, engine: AsyncLLM) -> Record:
    rng, record = random.Random(args.seed), Record()
    tasks = await make_tasks(engine, args.streams, args.output_len, rng)
    readers = [
        asyncio.create_task(keep_reading(engine, tasks, random.Random(rng.random()), record))
        for _ in range(args.streams)
    ]
    await asyncio.gather(torment(engine, args, rng, record), watch(engine, record), *readers)
    stats, _ = await engine.get_stats()
    record.verdicts["lost blocks"] = stats.num_blocks - stats.num_free_blocks
    return record


def report(args: argparse.Namespace, record: Record, load: float) -> bool:
    """Print the table; False when a promise was broken."""
    noticed = args.hang_seconds + _NOTICED_SECONDS
    figures: dict[str, dict[str, float]] = {}
    good = record.is_good
    print(f"{'fault':<32}{'injected':>9}{'recovered':>11}{'median, s':>11}{'worst, s':>10}{'allowed, s':>12}")
    for fault in sorted({*record.injected, *record.recoveries}):
        times = record.recoveries.get(fault, [])
        lives = 2 if fault == "two in a row" else 1
        allowed = lives * (load + ALLOWED_SECONDS) + (noticed if fault.startswith("stop") else 0.0)
        median, worst = (statistics.median(times), max(times)) if times else (0.0, 0.0)
        good &= worst <= allowed
        figures[fault] = {"injected": record.injected[fault], "median, s": median, "worst, s": worst}
        print(
            f"{fault:<32}{record.injected[fault]:>9}{len(times):>11}{median:>11.2f}{worst:>10.2f}{allowed:>12.2f}"
        )
    names = ("exact", "blamed", *BAD)
    print(
        f"first start {load:.2f} s; {record.num_tokens} tokens; health checked {record.num_checks} times",
        end="; ",
    )
    print(", ".join(f"{record.verdicts[name]} {name}" for name in names))
    told = {"faults": figures, "streams": {name: record.verdicts[name] for name in names}, "load, s": load}
    print(json.dumps({"script": "chaos", "seed": args.seed, "good": good, **told}))
    return good


def _faults(text: str) -> list[str]:
    return [] if text == "none" else text.split(",")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--pause", type=float, default=None, help="longest time between two faults, seconds")
    parser.add_argument("--streams", type=int, default=64, help="readers at once (64)")
    parser.add_argument("--output-len", type=int, default=None, help="longest stream, tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="oracle", help='"oracle", "demo", a folder or a GGUF file')
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--hang-seconds", type=float, default=8.0)
    parser.add_argument("--faults", type=_faults, default=list(FAULTS), help='commas between them, or "none"')
    args = parser.parse_args()
    if unknown := set(args.faults) - set(FAULTS):
        parser.error(f"--faults: {min(unknown)!r} is not one of {', '.join(FAULTS)}")
    is_oracle = args.model == "oracle"
    args.output_len = args.output_len or (2000 if is_oracle else 64)
    args.pause = args.pause or (1.0 if is_oracle else 15.0)
    return args


def make_engine(args: argparse.Namespace, folder: str) -> AsyncLLM:
    changes: dict[str, Any] = {"load_format": "auto", "model": args.model, "dtype": "float32"}
    if args.model == "oracle":
        config = {"architectures": ["Oracle"], "vocab_size": VOCAB_SIZE, "max_position_embeddings": LONGEST}
        Path(folder, "config.json").write_text(json.dumps(config))
        changes = {"load_format": "oracle", "model": folder, "num_gpu_blocks_override": 20_000}
    return AsyncLLM(
        AsyncEngineArgs(
            skip_tokenizer_init=True,
            max_model_len=LONGEST,
            tensor_parallel_size=args.tensor_parallel_size,
            hang_seconds=args.hang_seconds,
            **changes,
        )
    )


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        engine = make_engine(args, folder)
        load = time.monotonic() - began
        try:
            record = asyncio.run(run(args, engine))
        finally:
            engine.shutdown()
    sys.exit(0 if report(args, record, load) else 1)


main()
