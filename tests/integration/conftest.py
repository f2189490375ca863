"""Oracle engines: the real processes, with a model that needs no weights and whose every token is known."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from headrace import AsyncEngineArgs, AsyncLLM
from headrace.ipc import process

from .cores import VOCAB_SIZE, Daemon, NumberedClient


@pytest.fixture(scope="session")
def oracle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with nothing but a config.json."""
    folder = tmp_path_factory.mktemp("oracle")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "eos_token_id": 7,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def oracle_args(oracle_folder: Path) -> Callable[..., AsyncEngineArgs]:
    """`oracle_args(**changes)`"""

    def make(**changes: Any) -> AsyncEngineArgs:
        args: dict[str, Any] = {
            "model": str(oracle_folder),
            "load_format": "oracle",
            "skip_tokenizer_init": True,
            "num_gpu_blocks_override": 2000,
            "poison_blocks": True,
        }
        return AsyncEngineArgs(**(args | changes))

    return make


@pytest.fixture(scope="module")
def engine(oracle_args: Callable[..., AsyncEngineArgs]) -> Iterator[AsyncLLM]:
    """One engine for all tests of a module: each runs an event loop of its own on it.

    Recovery must not hide what the tests have done to it: it has not been needed.
    """
    engine = AsyncLLM.from_engine_args(oracle_args())
    yield engine
    if not engine.errored:
        stats, _ = asyncio.run(engine.get_stats())
        assert (engine._client.num_restarts, stats.num_restarts) == (0, 0)
    engine.shutdown()


@pytest.fixture(scope="module")
def slow_engine(
    oracle_args: Callable[..., AsyncEngineArgs], oracle_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AsyncLLM]:
    """2000 tokens take it 40 seconds: what is to be cut short has not ended before that."""
    folder = tmp_path_factory.mktemp("slow")
    config = json.loads((oracle_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"oracle_step_seconds": 0.02}))
    engine = AsyncLLM.from_engine_args(oracle_args(model=str(folder)))
    yield engine
    engine.shutdown()


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes find the modules of this folder."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)


@pytest.fixture
def embed_other(importable: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`embed_other(module)`: cores of engines that start from now on run that module of this folder."""
    spawn = process.spawn

    def other(module: str) -> None:
        monkeypatch.setattr(
            process, "spawn", lambda name, _, *args, **options: spawn(name, f"{module}:run", *args, **options)
        )

    return other


@pytest.fixture
def daemon(oracle_folder: Path, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """`daemon(*flags, **environment)` starts one."""
    daemons: list[Daemon] = []

    def make(*flags: str, **environment: str) -> Daemon:
        folder = tmp_path / f"daemon{len(daemons)}"
        folder.mkdir(exist_ok=True)
        daemons.append(Daemon(oracle_folder, folder, *flags, **environment))
        return daemons[-1]

    yield make
    for each in daemons:
        if each.process.poll() is None:
            for worker in psutil.Process(each.process.pid).children():
                worker.kill()  # one that a test has stopped does not notice its core's end
            each.process.kill()
            each.process.wait()
        if each.ready_fd >= 0:
            os.close(each.ready_fd)


@pytest.fixture
def connect() -> Iterator[Callable[..., NumberedClient]]:
    """`connect(address, name, keys)`"""
    clients: list[NumberedClient] = []

    def make(*args: Any, **kwargs: Any) -> NumberedClient:
        clients.append(NumberedClient(*args, **kwargs))
        return clients[-1]

    yield make
    for client in clients:
        client.socket.close()
