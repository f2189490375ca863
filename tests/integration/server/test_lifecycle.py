"""The server's life: one process or several, an end that loses nothing, deaths that others survive."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import psutil
import pytest
from headrace.ipc.oracle import oracle_stream

Serve = Callable[..., Any]
VOCAB_SIZE = 49152
SECONDS = 120
COUNT = 6000
"""Tokens of a long answer: seconds."""


@contextmanager
def streaming(client: httpx.Client, seed: int, **more: Any) -> Iterator[Iterator[list[int]]]:
    """A long stream that has begun; iterates over its token ids."""
    body = {"prompt": [1, 2, 3], "max_tokens": COUNT, "ignore_eos": True, "seed": seed, **more}
    body |= {"stream": True, "return_token_ids": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        yield _token_ids(lines)


def _token_ids(lines: Iterator[str]) -> Iterator[list[int]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(serve: Serve) -> None:
    server = serve("--drain-timeout", "600")
    with ExitStack() as stack:
        client = stack.enter_context(server.client())
        streams = [stack.enter_context(streaming(client, seed)) for seed in range(3)]
        assert client.get("/health/ready").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/live").status_code == 200
        refused = client.post("/v1/completions", json={"prompt": "Hello"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        with ThreadPoolExecutor() as readers:
            found = list(readers.map(lambda stream: [t for part in stream for t in part], streams))
        for seed, tokens in enumerate(found):
            want = oracle_stream([1, 2, 3], seed, COUNT, VOCAB_SIZE)
            assert len(tokens) > COUNT // 2  # without those of the first line
            assert tokens == want[-len(tokens) :]
    assert server.process.wait(SECONDS) == 0
    assert server.process.stderr.read() == ""


def test_a_second_signal_forces(serve: Serve) -> None:
    server = serve("--drain-timeout", "50")
    with server.client() as client, streaming(client, 1):
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(SECONDS) == 3
    assert "Traceback" not in server.process.stderr.read()


def test_a_drain_does_not_last_for_ever(serve: Serve) -> None:
    server = serve("--drain-timeout", "0.1")
    with server.client() as client, streaming(client, 1):
        assert server.end() == 3
    assert "did not finish in time" in server.process.stderr.read()


def test_several_workers(serve: Serve) -> None:
    """A server that is killed takes its own streams only; the core's death ends none."""
    server = serve("--workers", "2")
    assert server.line.startswith("headrace: 2 workers at http")
    supervisor = psutil.Process(server.process.pid)
    core, *servers = sorted(supervisor.children(), key=lambda child: child.create_time())
    assert len(servers) == 2
    exact = oracle_stream([1, 2, 3], 7, 30, VOCAB_SIZE)

    def answers() -> bool:
        body = {
            "prompt": [1, 2, 3],
            "seed": 7,
            "max_tokens": 30,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        try:
            with server.client() as client:
                response = client.post("/v1/completions", json=body)
        except httpx.TransportError:  # the connection was on its way to the dead one
            return False
        return response.status_code == 200 and bool(response.json()["choices"][0]["token_ids"] == exact)

    assert all(answers() for _ in range(8))
    # Whichever server is asked adds up what both have counted, and nothing is lost with one of them.
    wait_until(lambda: counted(server) == {8.0})
    servers[0].kill()
    wait_until(answers)
    wait_until(lambda: len(supervisor.children()) == 3)
    wait_until(lambda: min(counted(server), default=0) >= 9)
    assert servers[1].is_running()
    with server.client() as client, streaming(client, 5) as stream:
        tokens = next(stream)
        core.kill()
        tokens += [token for part in stream for token in part]
        want = oracle_stream([1, 2, 3], 5, COUNT, VOCAB_SIZE)
        assert tokens == want[-len(tokens) :]
        assert len(tokens) > COUNT // 2
    wait_until(lambda: len(supervisor.children()) == 3 and answers())
    assert servers[1].is_running()

    below = supervisor.children(recursive=True)
    assert server.end() == 0
    assert psutil.wait_procs(below, timeout=10)[1] == []
    assert "another one is started" in server.process.stderr.read()


def test_what_hangs_is_replaced(serve: Serve) -> None:
    """The supervisor's core, which the servers can only wait for: their streams go on in the next one. And a
    server."""
    server = serve("--workers", "2", "--hang-seconds", "5")
    core = min(psutil.Process(server.process.pid).children(), key=lambda child: child.create_time())
    with server.client() as client, streaming(client, 5) as stream:
        tokens = next(stream)
        core.suspend()
        tokens += [token for part in stream for token in part]
        assert tokens == oracle_stream([1, 2, 3], 5, COUNT, VOCAB_SIZE)[-len(tokens) :]
    assert not core.is_running()
    children = psutil.Process(server.process.pid).children()
    hung, other = children[:2]  # they are older than the new core
    hung.suspend()
    wait_until(lambda: not hung.is_running())
    wait_until(lambda: len(psutil.Process(server.process.pid).children()) == 3)
    assert other.is_running()
    assert server.end() == 0
    said = server.process.stderr.read()
    assert "the engine core hangs: silent for" in said
    assert f"a server (pid {hung.pid}, stopped" in said
    assert said.count("another one is started") == 2
    assert 'core/engine.py", line' in said  # its stacks


def counted(server: Any) -> set[float]:
    """Finished requests as /metrics has them, asked several times: by new connections, so of any server."""
    found: set[float] = set()
    for _ in range(6):
        with suppress(httpx.TransportError), server.client() as client:
            text = client.get("/metrics").text
            found.add(sum(float(n) for n in re.findall(r"vllm:request_success_total{.*} (.*)", text)))
    return found


def test_servers_attach_to_a_running_core(serve: Serve, tmp_path: Any) -> None:
    address = f"ipc://{tmp_path / 'private' / 'core'}"
    program = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()"]
    words = ["engine-core", "--model", "demo", "--load-format", "oracle", "--listen", address]
    words += ["--num-gpu-blocks-override", "4000", "--drain-timeout", "600"]
    with subprocess.Popen([*program, *words, "--ready-fd", "1"], stdout=subprocess.PIPE, text=True) as core:
        try:
            assert core.stdout is not None
            assert any('"Ready"' in line for line in core.stdout)
            servers = [serve("--engine-core", address), serve("--engine-core", address, "--workers", "2")]
            for server in servers:
                with server.client() as client:
                    assert client.get("/v1/models").json()["data"][0]["id"] == "demo"
                    assert client.post("/v1/completions", json={"prompt": "Hello"}).status_code == 200
            assert servers[1].end() == 0
            assert core.poll() is None
            expect_drain(servers[0], core)
        finally:
            core.terminate()


def expect_drain(server: Any, core: subprocess.Popen[str]) -> None:
    """A core that is about to end: no longer ready, new requests may be repeated, the old ones go on."""
    with server.client() as client, streaming(client, 3) as stream:
        core.terminate()
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/live").status_code == 200
        refused = client.post("/v1/completions", json={"prompt": "Hello"})
        assert refused.status_code == 503
        assert refused.json()["error"]["type"] == "overloaded_error"
        assert int(refused.headers["retry-after"]) >= 1
        tokens = [token for part in stream for token in part]
        assert tokens == oracle_stream([1, 2, 3], 3, COUNT, VOCAB_SIZE)[-len(tokens) :]
    assert core.wait(SECONDS) == 0
    assert server.end() == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--port", "99999"], "port"),
        (["--api-key-file", "/nonexistent"], "api_key_file"),
        (["--tool-call-parser", "mistral"], "tool_call_parser"),
        (["--ssl-keyfile", "key.pem"], "ssl_certfile"),
        (["--uds", "/nonexistent/socket"], "cannot listen"),
        (["--api-key", "secret"], "unknown argument '--api-key'"),
        (["--engine-core", "ipc:///nonexistent/core"], "no engine core listens"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(words: list[str], part: str) -> None:
    program = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()", "serve", "demo"]
    done = subprocess.run([*program, *words], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2
    assert part in done.stderr
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_a_taken_port(serve: Serve) -> None:
    server = serve()
    port = server.url.rpartition(":")[2]
    program = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()", "serve", "demo"]
    command = [*program, "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot listen at 127.0.0.1:{port}" in done.stderr
    os.kill(server.process.pid, signal.SIGINT)
    assert server.process.wait(SECONDS) == 0
