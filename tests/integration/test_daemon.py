"""`headrace engine-core`: how it starts, is watched, drains and ends, as supervisor and clients see it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
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
from headrace.ipc.messages import (
    PROTOCOL_VERSION,
    AddRequest,
    Call,
    Finished,
    FinishReason,
    FromCore,
    Hello,
    Reply,
    Sampling,
    StepOutputs,
    Welcome,
    pack,
    unpack,
)
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.sockets import ClientSocket

VOCAB_SIZE = 1000
TIMEOUT = 20.0
HEADRACE = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()"]


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


class Client:
    """A frontend in small."""

    def __init__(self, address: str, name: str = "test", keys: ClientKeys | None = None) -> None:
        self.socket = ClientSocket(address, keys)
        self.streams: dict[int, list[int]] = defaultdict(list)
        self.finished: dict[int, Finished] = {}
        self.socket.send(Hello(PROTOCOL_VERSION, name))
        welcome = self.recv()
        assert isinstance(welcome, Welcome)
        self.welcome = welcome

    def recv(self) -> FromCore:
        message = self.socket.recv(TIMEOUT)
        assert message is not None, "the core has gone silent"
        if isinstance(message, StepOutputs):
            for request, token in zip(unpack(message.requests), unpack(message.tokens), strict=True):
                self.streams[request].append(token)
            self.finished.update((ended.request, ended) for ended in message.finished)
        return message

    def add(self, request: int, max_tokens: int) -> None:
        self.socket.send(AddRequest(request, pack([request + 1, 2]), Sampling(seed=request), max_tokens))

    def start(self, *requests: int, max_tokens: int) -> None:
        """Add these, and return when each has brought a token."""
        for request in requests:
            self.add(request, max_tokens)
        while not all(self.streams[request] for request in requests):
            self.recv()

    def expect(self, *requests: int, max_tokens: int) -> None:
        """These end with exactly the tokens that they should have."""
        while not self.finished.keys() >= set(requests):
            self.recv()
        for request in requests:
            assert self.finished[request].reason is FinishReason.LENGTH
            assert self.streams[request] == oracle_stream([request + 1, 2], request, max_tokens, VOCAB_SIZE)

    def call(self, method: str) -> Reply:
        self.socket.send(Call(77, method))
        while not isinstance(message := self.recv(), Reply):
            pass
        return message

    def stats(self) -> Any:
        return self.call("stats").stats


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
def connect() -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(*args: Any, **kwargs: Any) -> Client:
        clients.append(Client(*args, **kwargs))
        return clients[-1]

    yield make
    for client in clients:
        client.socket.close()


Start = Callable[..., Daemon]
Connect = Callable[..., Client]


def test_sigterm_drains(daemon: Start, connect: Connect) -> None:
    core = daemon()
    client = connect(core.wait_ready())
    client.start(*range(32), max_tokens=1500)
    worker = core.worker()
    worker.suspend()  # nothing ends while we look
    core.process.send_signal(signal.SIGTERM)
    while not client.stats().draining:
        pass
    assert client.call("ping").unhealthy == "the engine core is about to end"
    late = connect(core.address)  # may look, but not ask for more
    late.add(1, 5)
    while 1 not in late.finished:
        late.recv()
    error = late.finished[1].error
    assert error is not None
    refused = error.exception()
    assert isinstance(refused, DrainingError)
    assert refused.retry_after > 0
    worker.resume()
    client.expect(*range(32), max_tokens=1500)
    assert core.process.wait(TIMEOUT) == 0
    assert not Path(core.address.removeprefix("ipc://")).exists()
    assert "draining signal=SIGTERM requests=32" in core.log()


def test_a_frontend_through_a_drain_and_a_new_core(daemon: Start) -> None:
    """What a program sees when its core is replaced: its stream ends as it should, the next one waits."""
    core = daemon()
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
    core = daemon("--drain-timeout", "600")
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
    port = _free_port()
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
    client.expect(1, 2, max_tokens=1900)
    _secrets_stay_secret(core, client, tmp_path)


async def _first_tokens(engine: AsyncLLM, count: int) -> list[int]:
    params = SamplingParams(max_tokens=count, seed=4, ignore_eos=True)
    outputs = [output async for output in engine.generate({"prompt_token_ids": [9]}, params, "guest")]
    return list(outputs[-1].outputs[0].token_ids)


def _secrets_stay_secret(core: Daemon, client: Client, folder: Path) -> None:
    secrets = [read_secret(str(folder / f"{name}.secret"), "x") for name in ("server", "client", "guest")]
    for pid in (core.process.pid, core.worker().pid):
        shown = Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
        assert not any(secret in shown for secret in secrets)
    told = f"{core.log()} {client.welcome}".encode()
    assert not any(secret in told for secret in secrets)


def status(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HEADRACE, "status", *words], capture_output=True, text=True, timeout=TIMEOUT)


def test_status(daemon: Start, connect: Connect) -> None:
    core = daemon()
    address = core.wait_ready()
    client = connect(address, "the busy one")
    core.worker().suspend()
    for request in range(3):
        client.add(request, 1900)
    before, stats = None, client.stats()
    while stats != before or stats.num_running + stats.num_waiting < 3:  # the plans that go ahead are out
        time.sleep(0.1)
        before, stats = stats, client.stats()
    shown = status(address, "--once", "--interval", "0.1")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert ": serving\n" in shown.stdout
    running, waiting = stats.num_running, stats.num_waiting  # few: two steps are under way, for ever
    assert f"requests   {running} running, {waiting} waiting" in shown.stdout
    (line,) = (line for line in shown.stdout.splitlines() if line.startswith("the busy one"))
    assert line.split()[3:8] == [str(running), str(waiting), str(running), "0.0", "0"]
    told = json.loads(status(address, "--once", "--json", "--interval", "0.1").stdout)
    assert (told["num_running"], told["num_waiting"], told["state"]) == (running, waiting, "serving")
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
        client.add(number, 1900)
        time.sleep(choose.uniform(0.0, 0.2))
        other.kill()
        began = time.monotonic()
        while len(client.call("stats").clients) > 1:
            assert time.monotonic() - began < 5
        client.expect(number, max_tokens=1900)
        stats = client.stats()
        assert stats.num_free_blocks == stats.num_blocks
        assert (stats.num_running, stats.num_waiting) == (0, 0)


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_stopped_frontend_costs_only_itself(
    daemon: Start, connect: Connect, frontend: Callable[..., subprocess.Popen[str]], transport: str
) -> None:
    core = daemon(*(() if transport == "ipc" else ("--listen", f"tcp://127.0.0.1:{_free_port()}")))
    address = core.wait_ready()
    client = connect(address)
    other = frontend(address, 2, 1900)
    other.send_signal(signal.SIGSTOP)
    client.start(*range(8), max_tokens=1900)
    client.expect(*range(8), max_tokens=1900)
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
    client.start(1, 2, 3, max_tokens=700)
    for other in others:
        out, _ = other.communicate(timeout=TIMEOUT)
        assert json.loads(out) == [oracle_stream([i + 1, 2], i, 400, VOCAB_SIZE) for i in range(3)]
    client.expect(1, 2, 3, max_tokens=700)


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
        client.expect(*range(8), max_tokens=1900)
    assert core.end() == 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
