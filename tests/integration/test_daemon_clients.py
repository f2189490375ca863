"""A daemon's frontends: killed, stopped, coming and going, or more than there are descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from headrace.ipc.messages import PROTOCOL_VERSION, Hello, Welcome
from headrace.ipc.oracle import oracle_stream

from .cores import TIMEOUT, VOCAB_SIZE, Daemon, NumberedClient, free_port

Start = Callable[..., Daemon]
Connect = Callable[..., NumberedClient]
FRONTEND = """
import json, sys
from headrace.ipc.messages import PROTOCOL_VERSION, AddRequest, Hello, Sampling, StepOutputs, pack, unpack
from headrace.ipc.sockets import ClientSocket
socket, streams, ended = ClientSocket(sys.argv[1]), {}, 0
socket.send(Hello(PROTOCOL_VERSION, "other process"))
for request in range(int(sys.argv[2])):
    socket.send(AddRequest(request, pack([request + 1, 2]), Sampling(seed=request), int(sys.argv[3])))
while ended < int(sys.argv[2]):
    message = socket.recv(60)
    if isinstance(message, StepOutputs):
        if not streams and message.requests:
            print("streaming", flush=True)
        for request, token in zip(unpack(message.requests), unpack(message.tokens)):
            streams.setdefault(request, []).append(token)
        ended += len(message.finished)
print(json.dumps([streams[request] for request in range(int(sys.argv[2]))]))
"""


@pytest.fixture
def frontend() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`frontend(address, number of requests, tokens of each)`: a frontend in a process of its own that has
    got its first tokens."""
    started: list[subprocess.Popen[str]] = []

    def make(address: str, requests: int, max_tokens: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", FRONTEND, address, str(requests), str(max_tokens)]
        started.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "streaming\n"
        return started[-1]

    yield make
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_frontend_frees_everything(
    daemon: Start, connect: Connect, frontend: Callable[..., subprocess.Popen[str]]
) -> None:
    """One after another, at random moments; whoever stays reads what is right."""
    core = daemon("--max-num-seqs", "4")
    address = core.wait_ready()
    client = connect(address)
    idle = frontend(address, 1, 1)
    idle.wait(TIMEOUT)  # left without a word, with nothing at work
    choose = random.Random(5)
    for number in range(5):
        other = frontend(address, 20, 1900)  # most of them in the queue
        client.begin(number, 1900)
        time.sleep(choose.uniform(0.0, 0.2))
        other.kill()
        began = time.monotonic()
        while len(client.call("stats").clients) > 1:
            assert time.monotonic() - began < 5
        client.finish(number, max_tokens=1900)
        stats = client.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert (stats.num_running, stats.num_waiting) == (0, 0)


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_stopped_frontend_costs_only_itself(
    daemon: Start, connect: Connect, frontend: Callable[..., subprocess.Popen[str]], transport: str
) -> None:
    core = daemon(*(() if transport == "ipc" else ("--listen", f"tcp://127.0.0.1:{free_port()}")))
    address = core.wait_ready()
    client = connect(address)
    other = frontend(address, 2, 1900)
    other.send_signal(signal.SIGSTOP)
    client.start(*range(8), max_tokens=1900)
    client.finish(*range(8), max_tokens=1900)
    if transport == "tcp":  # nobody can tell a stopped one from one whose network is gone
        began = time.monotonic()
        while len(client.call("stats").clients) > 1:
            assert time.monotonic() - began < 10
        return
    while client.stats().num_running:
        pass
    other.send_signal(signal.SIGCONT)
    out, _ = other.communicate(timeout=TIMEOUT)
    assert json.loads(out) == [oracle_stream([i + 1, 2], i, 1900, VOCAB_SIZE) for i in range(2)]


def test_frontends_come_and_go(
    daemon: Start, connect: Connect, frontend: Callable[..., subprocess.Popen[str]]
) -> None:
    core = daemon()
    address = core.wait_ready()
    client = connect(address)
    client.start(1, 2, 3, max_tokens=1900)
    others = [frontend(address, 3, 400) for _ in range(2)]  # the same numbers as ours
    client.socket.send(Hello(PROTOCOL_VERSION, "again"))  # starts anew: our three are gone
    while not isinstance(client.recv(), Welcome):
        pass
    client.streams.clear()
    client.started.clear()
    client.finished.clear()  # they may have ended before
    client.start(1, 2, 3, max_tokens=700)
    for other in others:
        out, _ = other.communicate(timeout=TIMEOUT)
        assert json.loads(out) == [oracle_stream([i + 1, 2], i, 400, VOCAB_SIZE) for i in range(3)]
    client.finish(1, 2, 3, max_tokens=700)


@pytest.fixture
def few_descriptors() -> Iterator[Callable[[int], None]]:
    """`few_descriptors(n)`: so many are allowed from now on, unless a process asks for more."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 3000:
        pytest.skip("this machine does not allow 3000 descriptors")
    yield lambda count: resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


def test_more_connections_than_descriptors_by_default(
    daemon: Start, connect: Connect, few_descriptors: Callable[[int], None]
) -> None:
    """More than 1024 descriptors, too: there `select` ends."""
    few_descriptors(1024)
    core = daemon()
    client = connect(core.wait_ready())
    client.start(*range(8), max_tokens=1900)
    few_descriptors(3000)
    with contextlib.ExitStack() as stack:
        for _ in range(1200):
            crowd = stack.enter_context(socket.socket(socket.AF_UNIX))
            crowd.connect(core.address.removeprefix("ipc://"))
        while len(os.listdir(f"/proc/{core.process.pid}/fd")) < 1200:
            client.stats()
        core.worker().kill()
        while not client.stats().num_restarts:
            pass
        client.finish(*range(8), max_tokens=1900)
    assert core.end() == 0
