"""A small HTTP client whose answers are server-sent events, and a server to ask, as a process of its own.

In a test of load the clients must be the cheap part: one connection for each request, no headers kept.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import msgspec
import psutil


class Choice(msgspec.Struct):
    index: int
    token_ids: list[int] = []
    finish_reason: str | None = None


class Chunk(msgspec.Struct):
    """What the load looks at in an event; `error` where there should be none."""

    choices: list[Choice] = []
    error: Any = None


_decoder = msgspec.json.Decoder(Chunk)


class HttpError(Exception):
    """An answer other than 200."""


@asynccontextmanager
async def post_stream(port: int, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[Chunk]]:
    """The events of one answer. Leaving early hangs up. Raises HttpError, ConnectionError."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise HttpError(status.decode())
        yield _events(reader)
    finally:
        writer.transport.abort()


async def get(port: int, path: str) -> str:
    """The body of one answer. Raises HttpError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    finally:
        writer.transport.abort()
    if " 200 " not in head.partition("\r\n")[0]:
        raise HttpError(head)
    return body


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[Chunk]:
    async for line in reader:  # chunk sizes and headers are lines too: only events begin with "data: "
        if line.startswith(b"data: {"):
            yield _decoder.decode(line[6:])
        elif line.startswith(b"data: [DONE]"):
            return
    raise ConnectionError("the stream ended without [DONE]")


class Serving:
    """A running `headrace serve`."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def memory(self) -> dict[str, float]:
        """MiB of each process's own memory, by what it runs."""
        root = psutil.Process(self.process.pid)
        sizes: dict[str, float] = {"server": 0.0}
        for one in [root, *root.children(recursive=True)]:
            words = " ".join(one.cmdline())
            role = next((role for role in ("core", "worker") if f"headrace.{role}.main" in words), "server")
            sizes[role] = sizes.get(role, 0.0) + one.memory_full_info().uss / 2**20
        return sizes


@contextmanager
def serving(words: Sequence[str]) -> Iterator[Serving]:
    """`headrace serve WORDS`, ended in good order."""
    program = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()"]
    command = [*program, "serve", *words, "--port", "0", "--no-access-log"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at http" not in line:
            raise SystemExit("the server did not start")
        yield Serving(process, int(line.split()[-1].rpartition(":")[2]))
    finally:
        process.terminate()
        process.wait(60)
