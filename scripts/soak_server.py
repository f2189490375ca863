"""A server under clients that come, go, hang up and ask nonsense: all that it holds must come back.

    python scripts/soak_server.py [--minutes 10] [--num-clients 16] [--model demo]

Ends with an error when, once all clients have left, a request still runs or a KV block is still in use, when
an answer was not what its request deserves, or when a process's memory kept growing.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import uvloop
from benchlib.http_stream import HttpError, Serving, get, post_stream, serving

WARM_SHARE = 0.4
"""Of the time; caches and arenas fill up at first."""
MAX_GROWTH = 1.10
SETTLE_SECONDS = 30


async def client(
    server: Serving, rng: random.Random, deadline: float, counts: collections.Counter[str]
) -> None:
    while time.monotonic() < deadline:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": " ".join(["why"] * rng.randrange(1, 200))}],
            "max_tokens": rng.randrange(1, 60),
            "temperature": rng.choice([0, 0.8]),
            "stream": True,
        }
        if rng.random() < 0.1:
            body["temperature"] = -1
        patience = rng.choice([None, None, rng.randrange(1, 20), rng.random()])
        counts[await one(server.port, body, patience)] += 1


async def one(port: int, body: dict[str, Any], patience: float | None) -> str:
    """How a request went. `patience` is the number of events read before hanging up, or seconds below 1."""
    try:
        async with asyncio.timeout(patience if isinstance(patience, float) else None):
            async with post_stream(port, "/v1/chat/completions", body) as events:
                number = 0
                async for chunk in events:
                    if chunk.error is not None:
                        raise SystemExit(f"a stream ended with {chunk.error}")
                    number += 1
                    if number == patience:
                        return "hung up"
    except TimeoutError:
        return "hung up before the end"
    except HttpError as error:
        if " 400 " in str(error) and body["temperature"] < 0:
            return "refused"
        raise SystemExit(f"a good request was answered by {error}") from None
    return "answered"


async def soak(server: Serving, args: argparse.Namespace) -> None:
    began = time.monotonic()
    deadline = began + 60 * args.minutes
    counts: collections.Counter[str] = collections.Counter()
    samples: list[tuple[float, dict[str, float]]] = []

    async def watch() -> None:
        while True:
            samples.append((time.monotonic(), server.memory()))
            await asyncio.sleep(1)

    watching = asyncio.ensure_future(watch())
    rng = random.Random(args.seed)
    seeds = [random.Random(rng.random()) for _ in range(args.num_clients)]
    await asyncio.gather(*(client(server, one, deadline, counts) for one in seeds))
    watching.cancel()
    print(dict(counts))
    await settle(server)
    check_memory([(at, sizes) for at, sizes in samples if at > began + WARM_SHARE * (deadline - began)])


async def settle(server: Serving) -> None:
    """Wait until nothing is held any more. Raises SystemExit."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        engine = json.loads(await get(server.port, "/stats"))["engine"]
        load = json.loads(await get(server.port, "/load"))["server_load"]
        held = engine["num_running"] + engine["num_waiting"] + load
        free, blocks = engine["num_free_blocks"], engine["num_blocks"]
        if held == 0 and free == blocks:
            print(f"{free} of {blocks} blocks are free, no request is left")
            return
        if time.monotonic() > deadline:
            message = f"after {SETTLE_SECONDS} s {free} of {blocks} blocks are free, {held} requests left"
            raise SystemExit(message)
        await asyncio.sleep(0.2)


def check_memory(samples: Sequence[tuple[float, dict[str, float]]]) -> None:
    """The last third of the time against the first. Raises SystemExit."""
    third = max(len(samples) // 3, 1)
    for role in samples[0][1]:
        first = statistics.median(sizes[role] for _, sizes in samples[:third])
        last = statistics.median(sizes[role] for _, sizes in samples[-third:])
        print(f"memory of the {role}: {first:.1f} MiB, later {last:.1f} MiB")
        if last > MAX_GROWTH * first:
            raise SystemExit(f"the {role}'s memory keeps growing")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--num-clients", type=int, default=16)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parsed = parser.parse_args()
    # So few blocks that all of them have been written to before memory is looked at.
    words = [parsed.model, "--max-model-len", "1024", "--num-gpu-blocks-override", "128"]
    with serving(words) as running, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(soak(running, parsed))
