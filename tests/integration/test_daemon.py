"""`headrace engine-core`: how it starts, is watched, drains and ends, as supervisor and clients see it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    ConfigError,
    DrainingError,
    EngineUnhealthyError,
    SamplingParams,
)
from headrace.ipc.curve import ClientKeys, make_pair, read_secret
from headrace.ipc.messages import FromCore
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.sockets import ClientSocket

from .cores import HEADRACE, TIMEOUT, VOCAB_SIZE, Daemon, NumberedClient, free_port

Start = Callable[..., Daemon]
Connect = Callable[..., NumberedClient]


def test_sigterm_drains(daemon: Start, connect: Connect) -> None:
    core = daemon("--drain-timeout", "600", "--hang-seconds", "600")
    client = connect(core.wait_ready())
    client.start(*range(32), max_tokens=1500)
    worker = core.worker()
    worker.suspend()  # nothing ends while we look
    core.process.send_signal(signal.SIGTERM)
    while not client.stats().draining:
        pass
    assert client.call("ping").unhealthy == "the engine core is about to end"
    late = connect(core.address)  # may look, but not ask for more
    late.begin(1, 5)
    while 1 not in late.finished:
        late.recv()
    error = late.finished[1].error
    assert error is not None
    refused = error.exception()
    assert isinstance(refused, DrainingError)
    assert refused.retry_after > 0
    worker.resume()
    client.finish(*range(32), max_tokens=1500)
    assert core.process.wait(TIMEOUT) == 0
    assert not Path(core.address.removeprefix("ipc://")).exists()
    assert "draining signal=SIGTERM requests=32" in core.log()


def test_a_frontend_through_a_drain_and_a_new_core(daemon: Start) -> None:
    """What a program sees when its core is replaced: its stream ends as it should, the next one waits."""
    core = daemon("--drain-timeout", "600", "--hang-seconds", "600")
    address = core.wait_ready()

    async def read(engine: AsyncLLM, request_id: str, seed: int) -> list[int]:
        params = SamplingParams(max_tokens=1500, seed=seed, ignore_eos=True)
        prompt: Any = {"prompt_token_ids": [seed, 2]}
        outputs = [output async for output in engine.generate(prompt, params, request_id)]
        return list(outputs[-1].outputs[0].token_ids)

    async def look_until_unhealthy(engine: AsyncLLM) -> None:
        while True:
            await engine.check_health()

    async def run(engine: AsyncLLM) -> None:
        worker = core.worker()
        worker.suspend()
        first = asyncio.create_task(read(engine, "first", 1))
        while (await engine._client.call("stats")).clients[0].num_running == 0:
            pass
        core.process.send_signal(signal.SIGTERM)
        with pytest.raises(EngineUnhealthyError, match="about to end"):
            await look_until_unhealthy(engine)
        with pytest.raises(DrainingError) as caught:
            await read(engine, "refused", 2)
        assert caught.value.retry_after > 0
        worker.resume()
        assert await first == oracle_stream([1, 2], 1, 1500, VOCAB_SIZE)
        assert await asyncio.to_thread(core.process.wait, TIMEOUT) == 0
        waiting = asyncio.create_task(read(engine, "second", 3))
        await asyncio.to_thread(daemon("--listen", address).wait_ready)
        assert await waiting == oracle_stream([3, 2], 3, 1500, VOCAB_SIZE)
        await engine.check_health()

    with asyncio.Runner() as runner:
        engine = AsyncLLM(AsyncEngineArgs(engine_core_address=address))
        runner.run(asyncio.wait_for(run(engine), 3 * TIMEOUT))
        engine.shutdown()


def test_a_cores_last_words_are_heard(daemon: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """They and its end come between a frontend's look for messages and its look for the connection."""
    core = daemon("--drain-timeout", "600", "--hang-seconds", "600")
    address, recv = core.wait_ready(), ClientSocket.recv

    def come_too_early(sock: ClientSocket, timeout: float = 0) -> FromCore | None:
        monkeypatch.setattr(ClientSocket, "recv", recv)
        core.worker().resume()
        assert core.process.wait(TIMEOUT) == 0
        assert sock._monitor.poll(int(TIMEOUT * 1000))
        return None

    async def run(engine: AsyncLLM) -> list[int]:
        core.worker().suspend()
        params = SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
        stream = engine.generate({"prompt_token_ids": [1, 2]}, params)
        answer = asyncio.create_task(anext(aiter(stream)))
        while (await engine._client.call("stats")).clients[0].num_running == 0:
            pass
        core.process.send_signal(signal.SIGTERM)
        monkeypatch.setattr(ClientSocket, "recv", come_too_early)
        outputs = [await answer, *[output async for output in stream]]
        return list(outputs[-1].outputs[0].token_ids)

    with asyncio.Runner() as runner:
        engine = AsyncLLM(AsyncEngineArgs(engine_core_address=address, engine_core_reconnect_seconds=1))
        found = runner.run(asyncio.wait_for(run(engine), 3 * TIMEOUT))
        assert found == oracle_stream([1, 2], 1, 3, VOCAB_SIZE)
        engine.shutdown()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_core_ends_at_once(daemon: Start, connect: Connect, number: signal.Signals) -> None:
    core = daemon()
    connect(core.wait_ready())
    worker = core.worker()
    began = time.monotonic()
    assert core.end(number) == 0
    assert time.monotonic() - began < 5
    assert not worker.is_running()


def test_a_second_signal_forces(daemon: Start, connect: Connect) -> None:
    core = daemon("--drain-timeout", "600", "--hang-seconds", "600")
    client = connect(core.wait_ready())
    client.start(1, max_tokens=1900)
    worker = core.worker()
    worker.suspend()  # its step takes for ever
    core.process.send_signal(signal.SIGTERM)
    while not client.stats().draining:
        pass
    assert core.end() == 3
    assert not worker.is_running()


def test_a_drain_has_a_limit(daemon: Start, connect: Connect) -> None:
    core = daemon("--drain-timeout", "0.5")
    client = connect(core.wait_ready())
    client.start(1, max_tokens=1900)
    core.worker().suspend()
    assert core.end() == 3
    assert "requests_cut_off=1" in core.log()


def test_sigterm_while_it_starts(daemon: Start) -> None:
    core = daemon("--load-format", "dummy")  # imports torch: takes seconds
    deadline = time.monotonic() + TIMEOUT
    while "phase=" not in core.log():
        assert time.monotonic() < deadline
    assert core.end() == 0


def test_exit_codes_of_what_cannot_work(daemon: Start) -> None:
    first = daemon()
    first.wait_ready()
    in_use = daemon("--listen", first.address)
    assert in_use.process.wait(TIMEOUT) == 2
    assert "another process listens" in in_use.log()
    too_long = daemon("--num-gpu-blocks-override", "2", "--max-model-len", "2000")
    assert too_long.process.wait(TIMEOUT) == 2
    too_large = daemon("--num-gpu-blocks-override", str(2**31 - 1))
    assert too_large.process.wait(TIMEOUT) == 1
    assert "MemoryError" in too_large.log()
    assert os.read(too_large.ready_fd, 1) == b""


def test_systemd_is_told(daemon: Start, connect: Connect, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(TIMEOUT)
        manager.bind(str(tmp_path / "notify"))
        core = daemon(NOTIFY_SOCKET=str(tmp_path / "notify"))
        told = [manager.recv(4096).decode()]
        while not told[-1].startswith("WATCHDOG=1"):
            told.append(manager.recv(4096).decode())
        ready = next(i for i, text in enumerate(told) if text.startswith("READY=1\n"))
        assert any(text.startswith("STATUS=starting: worker 0: ") for text in told[:ready])
        assert all(text.startswith("STATUS=starting: ") for text in told[:ready])
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{core.worker().pid}/environ").read_bytes()
        assert core.end() == 0
        while not told[-1].startswith("STOPPING=1\n"):
            told.append(manager.recv(4096).decode())


def test_the_log_is_for_programs_too(daemon: Start, connect: Connect) -> None:
    core = daemon("--log-format", "json")
    client = connect(core.wait_ready(), 'x" requests=9\n{"event": "forged"}\x1b[2J')
    client.call("ping")
    assert core.end() == 0
    lines = [json.loads(line) for line in core.log().splitlines()]
    assert {"serving", "client is here", "draining", "end"} <= {line["event"] for line in lines}
    (here,) = (line for line in lines if line["event"] == "client is here")
    assert here["client"] == 'x" requests=9?{"event": "forged"}?[2J'
    assert here["level"] == "info"
    (serving,) = (line for line in lines if line["event"] == "serving")
    assert (serving["address"], serving["num_blocks"]) == (core.address, 4000)


def test_the_log_is_for_people(daemon: Start, connect: Connect) -> None:
    core = daemon()
    connect(core.wait_ready(), 'a "name"')
    assert core.end() == 0
    lines = core.log().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT[\d:.+]+ INFO    \w", line) for line in lines)
    assert any(line.endswith('client is here client="a \\"name\\""') for line in lines)


def test_sighup_loses_nothing_and_reads_the_keys_again(
    daemon: Start, connect: Connect, tmp_path: Path
) -> None:
    for name in ("server", "client", "guest"):
        make_pair(tmp_path, name)
    allowed = tmp_path / "allowed"
    allowed.write_bytes((tmp_path / "client.public").read_bytes())
    port = free_port()
    keys = ("--curve-secret-key", str(tmp_path / "server.secret"), "--curve-client-keys", str(allowed))
    core = daemon("--listen", f"tcp://127.0.0.1:{port}", *keys)
    address = core.wait_ready()
    mine = ClientKeys(str(tmp_path / "server.public"), str(tmp_path / "client.secret"))
    client = connect(address, keys=mine)
    client.start(1, 2, max_tokens=1900)

    def attach(name: str) -> AsyncLLM:
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                engine_core_address=address,
                engine_core_curve_server_key=str(tmp_path / "server.public"),
                engine_core_curve_secret_key=str(tmp_path / f"{name}.secret"),
            )
        )

    with pytest.raises(ConfigError, match="are these the right ones"):
        attach("guest")
    with allowed.open("ab") as file:
        file.write((tmp_path / "guest.public").read_bytes())
    core.process.send_signal(signal.SIGHUP)
    while "reloaded" not in core.log():
        client.call("ping")
    guest = attach("guest")
    assert asyncio.run(_first_tokens(guest, 5)) == oracle_stream([9], 4, 5, VOCAB_SIZE)
    guest.shutdown()
    allowed.write_bytes(b"nonsense")
    core.process.send_signal(signal.SIGHUP)
    while "reload failed" not in core.log():
        client.call("ping")
    connect(address, keys=mine)
    client.finish(1, 2, max_tokens=1900)
    _secrets_stay_secret(core, client, tmp_path)


async def _first_tokens(engine: AsyncLLM, count: int) -> list[int]:
    params = SamplingParams(max_tokens=count, seed=4, ignore_eos=True)
    outputs = [output async for output in engine.generate({"prompt_token_ids": [9]}, params, "guest")]
    return list(outputs[-1].outputs[0].token_ids)


def _secrets_stay_secret(core: Daemon, client: NumberedClient, folder: Path) -> None:
    secrets = [read_secret(str(folder / f"{name}.secret"), "x") for name in ("server", "client", "guest")]
    for pid in (core.process.pid, core.worker().pid):
        shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert not any(secret in shown for secret in secrets)
    told = f"{core.log()} {client.welcome}".encode()
    assert not any(secret in told for secret in secrets)


def status(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HEADRACE, "status", *words], capture_output=True, text=True, timeout=TIMEOUT)


def test_status(daemon: Start, connect: Connect) -> None:
    core = daemon("--hang-seconds", "600")
    address = core.wait_ready()
    client = connect(address, "the busy one")
    core.worker().suspend()
    for request in range(3):
        client.begin(request, 1900)
    before, stats = None, client.stats()
    while stats != before or stats.num_running + stats.num_waiting < 3:  # the plans that go ahead are out
        time.sleep(0.1)
        before, stats = stats, client.stats()
    shown = status(address, "--once", "--interval", "0.1")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert ": serving\n" in shown.stdout or "worker 0: stopped" in shown.stdout  # after three seconds
    running, waiting = stats.num_running, stats.num_waiting  # few: two steps are under way, for ever
    assert f"requests   {running} running, {waiting} waiting" in shown.stdout
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith("the busy one"))
    assert line.split()[3:8] == [str(running), str(waiting), str(running), "0.0", "0"]
    told = json.loads(status(address, "--once", "--json", "--interval", "0.1").stdout)
    assert (told["num_running"], told["num_waiting"]) == (running, waiting)
    assert told["state"] == "serving" or "worker 0: stopped" in told["state"]
    assert told["num_blocks"] - told["num_free_blocks"] == running
    assert told["clients"][0]["name"] == "the busy one"


def test_status_of_nothing(tmp_path: Path) -> None:
    shown = status(f"ipc://{tmp_path}/core")
    assert shown.returncode == 2
    assert "no engine core listens" in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_status_ends_with_the_core(daemon: Start) -> None:
    core = daemon()
    words = [*HEADRACE, "status", core.wait_ready(), "--json", "--interval", "0.05"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        for _ in range(3):  # again and again
            assert json.loads(watching.stdout.readline())["num_running"] == 0
        assert core.end() == 0
        assert watching.wait(TIMEOUT) == 1
        assert watching.stderr.read().endswith("is gone\n")
