"""The examples, run as a user runs them, with the demo model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from .cores import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SECONDS = 250


def run_example(name: str, *args: str) -> str:
    """Its standard output; it must end well and complain of nothing."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def _demo_is_cached() -> None:
    """Fetch the model before anything is timed or its standard error looked at."""
    code = "from headrace.frontend.demo import demo_model_path; demo_model_path()"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=SECONDS)


def test_async_streaming_is_reproducible() -> None:
    shown = run_example("async_streaming", "--max-tokens", "16", *["--prompt", "One, two,"] * 2)
    _, first, second = shown.split("\n> One, two,\n")
    assert first.rstrip() == second.partition("\n\nfirst token after ")[0].rstrip()
    assert "[length]" in first or "[stop]" in first


def test_api_page() -> None:
    lines = run_example("api_page").splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith(("capital: ", "name: "))] == [
        "capital",
        "name",
    ]
    assert not any(line.startswith("endless") for line in lines)


def test_offline_knows_its_capitals() -> None:
    shown = run_example_with_progress("offline")
    first = shown.splitlines()[0]
    assert first.startswith("'The capital of France is' -> ")
    assert "Paris" in first
    assert "chat -> " in shown


def run_example_with_progress(name: str) -> str:
    """Like `run_example`, for one that shows a progress bar on standard error."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A program that is ended by SIGTERM, and must then end well."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def test_fastapi_server() -> None:
    port = free_port()
    command = [sys.executable, str(EXAMPLES / "fastapi_server.py"), "--port", str(port)]
    with running(command) as server, httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        assert server.stderr is not None
        for line in server.stderr:  # uvicorn says so once the lifespan has begun and it listens
            if "Uvicorn running" in line:
                break
        body = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 12}
        whole = client.post("/generate", json=body)
        assert whole.status_code == 200
        assert "Paris" in whole.json()["text"]
        assert whole.json()["finish_reason"] == "length"

        with client.stream("POST", "/stream", json=body) as response:
            pieces = list(response.iter_text())
        assert "".join(pieces) == whole.json()["text"]

        for path in ("/generate", "/stream"):
            refused = client.post(path, json={**body, "temperature": -1})
            assert refused.status_code == 400
            assert refused.json()["parameter"] == "temperature"

        with client.stream("POST", "/stream", json={**body, "max_tokens": 4000}) as response:
            next(response.iter_text())  # and hang up: the server must go on
        assert client.post("/generate", json=body).json() == whole.json()
    assert server.returncode in (0, -15)  # uvicorn ends in good order, then repeats the signal


def test_standalone_core(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path / 'private' / 'core'}"
    listening = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()", "engine-core"]
    listening += ["--model", "demo", "--max-model-len", "256", "--listen", address, "--ready-fd", "1"]
    with running(listening) as core:
        assert core.stdout is not None
        assert any('"Ready"' in line for line in core.stdout)
        lines = run_example("standalone_core", address).splitlines()
        assert len(lines) == 2
        assert lines[0].removeprefix("visit 0") == lines[1].removeprefix("visit 1")
    assert core.returncode == 0
