"""Cores as processes, and clients that speak to them over their sockets as any frontend would."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import psutil
from headrace.ipc.config import EngineConfig
from headrace.ipc.curve import ClientKeys
from headrace.ipc.messages import (
    PROTOCOL_VERSION,
    AddRequest,
    Bye,
    Call,
    CallMethod,
    EngineInfo,
    Finished,
    FinishReason,
    FromCore,
    FromStarting,
    Hello,
    Progress,
    Ready,
    Reply,
    Sampling,
    Started,
    Stats,
    StepOutputs,
    Welcome,
    pack,
    unpack,
)
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.payloads import CoreStart
from headrace.ipc.process import Child, spawn
from headrace.ipc.sockets import ClientSocket

VOCAB_SIZE = 1000
TIMEOUT = 60.0
HEADRACE = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()"]


class Gate:
    """While it is closed, workers that are started do not get beyond the start of their interpreter.

    For processes with its `python_path`, and those below them.
    """

    _SITE = """
import os, sys, time
while "headrace.worker.main:run" in sys.orig_argv and os.path.exists({file!r}):
    time.sleep(0.01)
"""

    def __init__(self, folder: Path) -> None:
        self._file, site = folder / "gate is closed", folder / "gate"
        site.mkdir()
        (site / "sitecustomize.py").write_text(self._SITE.format(file=str(self._file)))
        self.python_path = os.pathsep.join([str(site), os.environ["PYTHONPATH"]])

    def close(self) -> None:
        self._file.touch()

    def open(self) -> None:
        self._file.unlink(missing_ok=True)


class Core:
    """A core process and the reading end of its status pipe."""

    def __init__(self, config: EngineConfig, address: str) -> None:
        self.config = config
        self.address = address
        reading, writing = os.pipe()
        start = CoreStart(config, address, writing)
        self.child: Child = spawn("core", "headrace.core.main:run", start, pass_fds=(writing,))
        os.close(writing)
        self.status = os.fdopen(reading, "rb")

    def news(self) -> Iterator[FromStarting]:
        decoder: msgspec.json.Decoder[FromStarting] = msgspec.json.Decoder(FromStarting)
        yield from map(decoder.decode, self.status)

    def wait_ready(self) -> EngineInfo:
        for message in self.news():
            if isinstance(message, Ready):
                assert message.address == self.address
                return message.info
            assert isinstance(message, Progress), message
        raise AssertionError(self.child.cause_of_death())

    def worker(self) -> psutil.Process:
        (worker,) = psutil.Process(self.child.pid).children()
        return worker

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Its worker is stopped: nothing ends while a test looks. Not for as long as counts as hanging."""
        worker = self.worker()
        worker.suspend()
        try:
            yield
        finally:
            worker.resume()

    def close(self) -> None:
        self.child.stop(2.0)
        self.status.close()


class Client:
    """A frontend in small: remembers per request what it got."""

    def __init__(self, address: str, name: str = "test", keys: ClientKeys | None = None) -> None:
        self.socket = ClientSocket(address, keys)
        self.streams: dict[int, list[int]] = defaultdict(list)
        self.started: dict[int, Started] = {}
        self.finished: dict[int, Finished] = {}
        self.socket.send(Hello(PROTOCOL_VERSION, name))
        welcome = self.recv()
        assert isinstance(welcome, Welcome)
        self.welcome = welcome
        self.vanished = False

    def recv(self) -> FromCore:
        message = self.socket.recv(TIMEOUT)
        assert message is not None, "the core has gone silent"
        if isinstance(message, StepOutputs):
            for request, token in zip(unpack(message.requests), unpack(message.tokens), strict=True):
                assert request not in self.finished
                assert request in self.started or request in {news.request for news in message.started}
                self.streams[request].append(token)
            self.started.update((news.request, news) for news in message.started)
            for ended in message.finished:
                assert ended.request not in self.finished
                self.finished[ended.request] = ended
        return message

    def add(self, request: int, prompt: list[int], max_tokens: int = 10, **sampling: Any) -> None:
        n = sampling.pop("n", 1)
        self.socket.send(AddRequest(request, pack(prompt), Sampling(**sampling), max_tokens, n))

    def wait_for(self, *requests: int) -> None:
        while not self.finished.keys() >= set(requests):
            self.recv()

    def call(self, method: CallMethod) -> Reply:
        self.socket.send(Call(77, method))
        while not isinstance(message := self.recv(), Reply):
            pass
        assert message.call == 77
        return message

    def stats(self) -> Stats:
        stats = self.call("stats").stats
        assert stats is not None
        return stats

    def wait_until_free(self) -> None:
        """Returns when no request holds a block; each look is a round trip."""
        deadline = time.monotonic() + TIMEOUT
        while (stats := self.stats()).num_free_blocks < stats.num_blocks:
            assert time.monotonic() < deadline, stats
        assert (stats.num_running, stats.num_waiting) == (0, 0)

    def expect(self, request: int, prompt: list[int], num_tokens: int, seed: int = 0) -> None:
        assert self.streams[request] == oracle_stream(prompt, seed, num_tokens, VOCAB_SIZE)

    def close(self) -> None:
        if not self.vanished:
            self.socket.send(Bye())
            self.vanish()

    def vanish(self) -> None:
        self.vanished = True
        self.socket.close()


class NumberedClient(Client):
    """Its requests follow from their numbers, and always run to their length."""

    def begin(self, request: int, max_tokens: int) -> None:
        self.add(request, [request + 1, 2], max_tokens, seed=request)

    def start(self, *requests: int, max_tokens: int) -> None:
        """Begin these, and return when each has brought a token."""
        for request in requests:
            self.begin(request, max_tokens)
        while not all(self.streams[request] for request in requests):
            self.recv()

    def finish(self, *requests: int, max_tokens: int) -> None:
        """These end with exactly the tokens that they should have."""
        self.wait_for(*requests)
        for request in requests:
            assert self.finished[request].reason is FinishReason.LENGTH
            self.expect(request, [request + 1, 2], max_tokens, seed=request)


class Daemon:
    """A running `headrace engine-core`; its log is in a file."""

    def __init__(self, model: Path, folder: Path, *flags: str, **environment: str) -> None:
        self.address = f"ipc://{folder}/run/core"
        if "--listen" not in flags:
            flags = (*flags, "--listen", self.address)
        self.log_path = folder / "log"
        self.ready_fd, writing = os.pipe()
        engine = ["--model", str(model), "--load-format", "oracle", "--skip-tokenizer-init"]
        engine += ["--num-gpu-blocks-override", "4000", "--ready-fd", str(writing)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*HEADRACE, "engine-core", *engine, *flags],
                pass_fds=(writing,),
                stderr=log,
                env=os.environ | environment,
            )
        os.close(writing)

    def wait_ready(self) -> str:
        """The address at which it serves."""
        with os.fdopen(self.ready_fd, "rb") as file:
            lines = file.read().splitlines()  # to the end: the descriptor is closed once it serves
        self.ready_fd = -1
        assert len(lines) == 1, self.log()
        name, address, _ = json.loads(lines[0])
        assert name == "Ready"
        return str(address)

    def log(self) -> str:
        return self.log_path.read_text()

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def worker(self) -> psutil.Process:
        (worker,) = psutil.Process(self.process.pid).children()
        return worker


def free_port() -> int:
    """Below those that the system gives to connections: none of these takes it before it is used."""
    while True:
        port = 15_000 + secrets.randbelow(15_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
