"""`headrace serve` as a process of its own: one server for a module's tests, reached over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from headrace.frontend.demo import demo_model_path

SECONDS = 250
COMMAND = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()", "serve"]
ORACLE = ["demo", "--load-format", "oracle", "--num-gpu-blocks-override", "4000"]
"""Exact tokens at no cost; the demo model's tokenizer gives them text."""


class Server:
    """A running server; `end` checks that it ends well."""

    def __init__(self, process: subprocess.Popen[str], line: str) -> None:
        self.process = process
        self.line = line
        """What it said once it served."""
        self.url = line.split()[-1]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS, **options)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(SECONDS)


@contextmanager
def running(*words: str, prefix: Sequence[str] = (), **environ: str) -> Iterator[Server]:
    """`prefix` is a command that runs the one after it."""
    # Nobody reads standard error while it serves: a full pipe would stop it.
    command = [*prefix, *COMMAND, "--no-access-log", *words, "--port", "0"]
    environment = {**os.environ, **environ}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        line = process.stdout.readline()  # "headrace: MODEL at URL", once it serves
        assert " at " in line, process.stderr.read()
        yield Server(process, line)
    finally:
        process.kill()
        sys.stderr.write(process.communicate(timeout=SECONDS)[1])


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Server]]:
    """`serve(*options, **environment)`: oracle servers that live as long as the module's tests."""
    demo_model_path()  # fetched before anything is timed
    with ExitStack() as stack:
        yield lambda *words, **environ: stack.enter_context(running(*ORACLE, *words, **environ))


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    """The demo model itself, where text matters."""
    demo_model_path()
    with running("demo", "--max-model-len", "1024", "--num-gpu-blocks-override", "256") as server:
        yield server


@pytest.fixture(scope="module")
def oracle(serve: Callable[..., Server]) -> Server:
    return serve("--max-model-len", "2048")


@pytest.fixture
def http(oracle: Server) -> Iterator[httpx.Client]:
    with oracle.client() as client:
        yield client
