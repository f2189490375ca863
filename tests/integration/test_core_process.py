"""A real core with a real worker (the oracle's), spoken to over its socket as any client would."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq
from headrace.ipc.config import EngineConfig
from headrace.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Bye,
    Call,
    Dying,
    Fatal,
    FinishReason,
    FromCore,
    Hello,
    Refused,
    Reply,
    Sampling,
    StepOutputs,
    Welcome,
    pack,
)
from headrace.ipc.oracle import oracle_stream

from .cores import TIMEOUT, VOCAB_SIZE, Client, Core, Gate

MakeConfig = Callable[..., EngineConfig]
Connect = Callable[..., Client]


@pytest.fixture
def start(make_config: MakeConfig, tmp_path: Path) -> Iterator[Callable[..., Core]]:
    """Starts cores; `start(**config changes)`."""
    cores: list[Core] = []

    def start_core(**changes: Any) -> Core:
        cores.append(Core(make_config(**changes), f"ipc://{tmp_path}/{len(cores)}"))
        return cores[-1]

    yield start_core
    for core in cores:
        core.close()


@pytest.fixture(scope="module")
def core(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    """One core for all tests that leave it as they found it."""
    config = make_config(
        max_model_len=20_000, max_num_seqs=16, max_num_batched_tokens=256, num_gpu_blocks_override=5000
    )
    with closing(Core(config, f"ipc://{tmp_path_factory.mktemp('core')}/socket")) as core:
        core.wait_ready()
        yield core


@pytest.fixture
def connect(core: Core) -> Iterator[Connect]:
    """Makes clients of the shared core."""
    clients: list[Client] = []

    def make(name: str = "test") -> Client:
        clients.append(Client(core.address, name))
        assert clients[-1].welcome.config == core.config
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    with closing(Client(core.address)) as looks:
        assert looks.stats().num_restarts == 0  # no test has crashed a worker on the way


def test_streams_of_many_clients(connect: Connect) -> None:
    clients = [connect(f"client {i}") for i in range(3)]
    prompts = {number: [number % 7] * (3 + 40 * number) for number in range(12)}
    for who, client in enumerate(clients):
        for number, prompt in prompts.items():
            client.add(number, [who, *prompt], 5 + number, seed=who)
    for who, client in enumerate(clients):
        client.wait_for(*prompts)
        for number, prompt in prompts.items():
            client.expect(number, [who, *prompt], 5 + number, seed=who)
            assert client.finished[number].reason is FinishReason.LENGTH
    clients[0].wait_until_free()


def test_the_figures_of_each_client(connect: Connect) -> None:
    busy, idle = connect("busy"), connect("idle")
    busy.add(1, [5] * 9, 10_000, n=2)
    while len(busy.streams[1]) < 20:
        busy.recv()
    clients = {each.name: each for each in idle.call("stats").clients}
    assert (clients["busy"].num_running, clients["busy"].num_waiting) == (2, 0)
    assert clients["busy"].num_blocks >= 2 * (29 // 4)
    assert clients["busy"].generation_tokens >= 40
    assert clients["busy"].connected_seconds > clients["idle"].connected_seconds > 0
    assert (clients["idle"].num_running, clients["idle"].generation_tokens) == (0, 0)


def test_n_children_are_numbered_and_seeded_in_a_row(connect: Connect) -> None:
    client = connect()
    client.add(10, [1, 2, 3, 4, 5], n=3, seed=41)
    client.wait_for(10, 11, 12)
    for child in range(3):
        client.expect(10 + child, [1, 2, 3, 4, 5], 10, seed=41 + child)


def test_stop_tokens_and_cached_prefixes(connect: Connect) -> None:
    client = connect()
    prompt = list(range(100, 120))
    stream = oracle_stream(prompt, 3, 8, VOCAB_SIZE)
    client.add(1, prompt, 8, seed=3, stop_token_ids=[stream[4]])
    client.wait_for(1)
    client.add(2, prompt, 8, seed=3, eos_token_id=stream[2])
    client.wait_for(2)
    assert (client.streams[1], client.streams[2]) == (stream[:5], stream[:3])
    assert (client.finished[1].reason, client.finished[1].stop_token_id) == (FinishReason.STOP, stream[4])
    assert (client.finished[2].reason, client.finished[2].stop_token_id) == (FinishReason.STOP, None)
    assert [client.started[i].num_cached_tokens for i in (1, 2)] == [0, 16]
    assert client.started[2].queued_seconds >= 0


def test_abort_is_silent_and_frees(connect: Connect) -> None:
    client = connect()
    for number in range(40):  # more than run at once
        client.add(number, [number, 1], 10_000)
    while 0 not in client.streams:
        client.recv()
    assert not client.call("reset_prefix_cache").ok
    client.socket.send(Abort([*range(40), 999]))
    client.wait_until_free()
    assert not client.finished
    assert client.call("reset_prefix_cache").ok
    client.add(0, [5], 3)  # the number is free again
    client.streams.clear()
    client.wait_for(0)
    client.expect(0, [5], 3)


def test_a_vanished_client_frees_and_disturbs_nobody(connect: Connect) -> None:
    stays, goes = connect("stays"), connect("goes")
    stays.add(1, [8, 9], 300)
    for number in range(30):
        goes.add(number, [number, 2], 10_000)
    while not goes.streams:
        goes.recv()
    goes.vanish()
    stays.wait_for(1)
    stays.expect(1, [8, 9], 300)
    stays.wait_until_free()


def test_a_client_that_vanishes_takes_its_pause_along(core: Core, connect: Connect) -> None:
    stays, goes = connect("stays"), connect("goes")
    with core.at_rest():
        stays.add(1, [8, 9], 3000)
        while not stays.stats().num_running:
            pass
        goes.socket.send(Call(78, "pause_generation", {"mode": "keep"}))
        while not stays.call("is_paused").ok:
            pass
    while not isinstance(goes.recv(), Reply):
        pass
    assert 1 not in stays.finished
    goes.vanish()
    stays.wait_for(1)
    stays.expect(1, [8, 9], 3000)
    assert not stays.call("is_paused").ok


def test_pauses_that_abort_what_has_just_ended(connect: Connect) -> None:
    """Each request ends once, in the message of its last tokens, whichever of the two was first."""
    client = connect()
    for turn in range(6):
        requests = range(16 * turn, 16 * turn + 16)
        for request in requests:
            client.add(request, [8, 9], 1 + request % 16)
        while requests[0] not in client.finished:
            client.recv()
        client.socket.send(Call(78, "pause_generation"))
        client.socket.send(Call(79, "resume_generation"))
        client.wait_for(*requests)
        for request in requests:
            tokens = oracle_stream([8, 9], 0, 1 + request % 16, VOCAB_SIZE)
            assert client.streams[request] == tokens[: len(client.streams[request])]
            aborted = client.finished[request].reason is FinishReason.ABORT
            assert aborted or client.streams[request] == tokens
        while not (isinstance(reply := client.recv(), Reply) and reply.call == 79):
            pass


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [
        ({"prompt": pack([1, 1000])}, "prompt"),
        ({"prompt": pack([-1])}, "prompt"),
        ({"prompt": b""}, "prompt"),
        ({"prompt": b"abc"}, "prompt"),
        ({"prompt": pack([1] * 20_000)}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1 << 40}, "n"),
        ({"request": -1}, "request"),
        ({"request": (1 << 31) - 1, "n": 2}, "request"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p"),
        ({"sampling": Sampling(top_k=1 << 63)}, "top_k"),
        ({"sampling": Sampling(seed=-1)}, "seed"),
        ({"sampling": Sampling(repetition_penalty=float("inf"))}, "repetition_penalty"),
        ({"sampling": Sampling(stop_token_ids=[1000])}, "stop_token_ids"),
        ({"sampling": Sampling(eos_token_id=-1)}, "eos_token_id"),
        ({"sampling": Sampling(min_tokens=6)}, "min_tokens"),
        ({"request": 500, "n": 2}, "request"),
    ],
)
def test_a_bad_request_fails_alone(
    core: Core, connect: Connect, changes: dict[str, Any], parameter: str
) -> None:
    client, other = connect(), connect()
    good = {"request": 3, "prompt": pack([1]), "sampling": Sampling(), "max_tokens": 5}
    bad = AddRequest(**{**good, **changes})
    with core.at_rest():  # 501 runs when the duplicate comes
        client.add(501, [6, 6], 200)
        other.add(501, [6, 7], 200)
        client.socket.send(bad)
        while bad.request not in client.finished:
            client.recv()
    ended = client.finished.pop(bad.request)
    client.finished.pop(501, None)  # of the duplicate alone: the live one goes on
    assert ended.reason is FinishReason.ERROR
    assert ended.error is not None
    assert (ended.error.kind, ended.error.parameter) == ("request", parameter)
    client.wait_for(501)
    client.expect(501, [6, 6], 200)
    other.wait_for(501)
    other.expect(501, [6, 7], 200)
    client.wait_until_free()


def test_bad_frames_harm_nobody(start: Callable[..., Core], capfd: pytest.CaptureFixture[str]) -> None:
    core = start(max_model_len=1000, num_gpu_blocks_override=500)
    core.wait_ready()
    client = Client(core.address)
    client.add(1, [3], 500)
    with zmq.Context[zmq.Socket[bytes]]() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.connect(core.address)
        decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        encode = msgspec.msgpack.encode

        def answer() -> FromCore:
            while True:
                assert raw.poll(int(TIMEOUT * 1000))
                message = decoder.decode(raw.recv())
                if message != StepOutputs(b"", b""):  # "are you still there?"
                    return message

        for stranger in (b"", b"\xff" * 9, encode(["Nonsense", 1]), encode(Call(1, "ping")), encode(Bye())):
            raw.send(stranger)
            assert answer() == Refused(PROTOCOL_VERSION, "the first message must be Hello")
        raw.send(encode(Hello(PROTOCOL_VERSION + 1, "from the future")))
        refused = answer()
        assert isinstance(refused, Refused)
        assert refused.protocol == PROTOCOL_VERSION
        assert f"from the future speaks {PROTOCOL_VERSION + 1}" in refused.message
        raw.send(encode(Hello(PROTOCOL_VERSION, "mumbler")))
        assert isinstance(answer(), Welcome)
        for parts in (
            [encode(["long name" * 100_000])],
            [b"\x00"],
            [encode(Call(9, "ping")), b"b"],
            [encode(["AddRequest", "one", b"", [], 1])],
        ):
            raw.send_multipart(parts)
            refused = answer()
            assert isinstance(refused, Refused)
            assert refused.message.startswith("unreadable message: ")
            assert len(refused.message) < 300
        raw.send(encode(Call(5, "ping")))
        assert answer() == Reply(5)
    client.wait_for(1)
    client.expect(1, [3], 500)
    client.close()
    log = capfd.readouterr().err
    assert log.count("unreadable message client=mumbler") == 1
    assert len(log) < 2000


def test_preemption_under_the_real_worker(start: Callable[..., Core]) -> None:
    core = start(max_model_len=128, num_gpu_blocks_override=32, max_num_seqs=8)
    core.wait_ready()
    client = Client(core.address)
    for number in range(30):
        client.add(number, [number, 1, 2, 3], 100, seed=number)
    client.wait_for(*range(30))
    for number in range(30):
        client.expect(number, [number, 1, 2, 3], 100, seed=number)
    assert client.stats().num_preemptions > 0
    client.wait_until_free()
    client.close()


def test_several_ranks_and_a_context_that_fits(start: Callable[..., Core]) -> None:
    core = start(
        tensor_parallel_size=2, max_model_len=100, max_model_len_is_explicit=False, num_gpu_blocks_override=9
    )
    info = core.wait_ready()
    assert (info.max_model_len, info.num_blocks) == (36, 9)
    client = Client(core.address)
    assert client.welcome == Welcome(PROTOCOL_VERSION, core.config, info)
    client.add(1, [4], 1000)
    client.wait_for(1)
    client.expect(1, [4], 35)
    client.close()


@pytest.mark.parametrize("busy", [False, True])
def test_sigterm_ends_in_good_order(
    start: Callable[..., Core], busy: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    core = start(max_model_len=20_000, num_gpu_blocks_override=5000)
    core.wait_ready()
    worker = core.worker()
    client = Client(core.address)
    if busy:
        client.add(1, [1], 10_000)
        client.recv()
        worker.suspend()  # a step that takes for ever
    began = time.monotonic()
    os.kill(core.child.pid, signal.SIGTERM)
    assert core.child.cause_of_death().endswith("exited with code 0")
    assert time.monotonic() - began < 6  # not until it counts as hanging
    assert not worker.is_running()
    assert not Path(core.address.removeprefix("ipc://")).exists()
    assert capfd.readouterr().err == ""
    client.close()


def test_a_killed_worker_is_replaced(
    start: Callable[..., Core],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    gate = Gate(tmp_path)
    monkeypatch.setenv("PYTHONPATH", gate.python_path)
    core = start(max_model_len=20_000, num_gpu_blocks_override=5000, tensor_parallel_size=2)
    core.wait_ready()
    clients = [Client(core.address), Client(core.address)]
    for client in clients:
        client.add(1, [1], 10_000)
        while 1 not in client.streams:
            client.recv()
    victim = psutil.Process(core.child.pid).children()[1]
    gate.close()
    victim.kill()
    words = f"worker 1, in phase 'serving': worker 1 (pid {victim.pid}) was killed by SIGKILL"
    unhealthy = ""
    while not unhealthy:
        unhealthy = clients[0].call("ping").unhealthy
    assert words in unhealthy
    clients[1].add(2, [2], 10)  # meanwhile the core takes requests
    gate.open()
    for client in clients:
        client.wait_for(1)
        client.expect(1, [1], 10_000)
    clients[1].wait_for(2)
    clients[1].expect(2, [2], 10)
    stats = clients[0].stats()
    assert (stats.num_restarts, stats.num_replays, stats.num_blocks) == (1, 2, 5000)
    assert not clients[0].call("ping").unhealthy
    clients[0].wait_until_free()
    for client in clients:
        client.close()
    assert capfd.readouterr().err.count(words) == 1


DEAD_AT_ONCE = """
import os, signal, sys
if "headrace.worker.main:run" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_that_never_come_back_are_the_end(
    start: Callable[..., Core],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    core = start(max_model_len=20_000, num_gpu_blocks_override=5000)
    core.wait_ready()
    client = Client(core.address)
    client.add(1, [1], 10_000)
    while 1 not in client.streams:
        client.recv()
    (tmp_path / "sitecustomize.py").write_text(DEAD_AT_ONCE)
    first = core.worker()
    first.kill()
    while isinstance(message := client.recv(), StepOutputs):
        pass
    words = f"worker 0, in phase 'serving': worker 0 (pid {first.pid}) was killed by SIGKILL"
    assert isinstance(message, Dying)
    assert (message.error.kind, message.error.message) == ("dead", words)
    client.close()
    assert core.child.cause_of_death().endswith("exited with code 1")
    fatal = list(core.news())[-1]
    assert isinstance(fatal, Fatal)
    assert (fatal.rank, fatal.phase) == (0, "serving")
    assert capfd.readouterr().err.count("workers failed: restarting") == 3


def test_no_orphans_when_the_core_is_killed(start: Callable[..., Core]) -> None:
    core = start()
    core.wait_ready()
    worker = os.pidfd_open(core.worker().pid)
    os.kill(core.child.pid, signal.SIGKILL)
    gone, _, _ = select.select([worker], [], [], 5)
    os.close(worker)
    assert gone


def test_a_configuration_that_cannot_fit(
    start: Callable[..., Core], capfd: pytest.CaptureFixture[str]
) -> None:
    core = start(max_model_len=65)
    fatal = list(core.news())[-1]
    assert isinstance(fatal, Fatal)
    assert (fatal.error.kind, fatal.error.parameter, fatal.error.value) == ("config", "max_model_len", "65")
    assert "17 KV blocks of 4 tokens" in fatal.error.message
    assert core.child.cause_of_death().endswith("exited with code 2")
    assert capfd.readouterr().err == ""  # whoever reads the status pipe says it


def test_a_worker_that_cannot_start_says_why(start: Callable[..., Core]) -> None:
    core = start(num_gpu_blocks_override=10**15)
    fatal = list(core.news())[-1]
    assert isinstance(fatal, Fatal)
    assert (fatal.rank, fatal.phase, fatal.error.kind) == (0, "allocate KV cache", "dead")
    assert "MemoryError" in fatal.error.message
    assert core.child.cause_of_death().endswith("exited with code 1")


def test_an_address_in_use(start: Callable[..., Core], core: Core) -> None:
    second = Core(core.config, core.address)
    fatal = list(second.news())[-1]
    assert isinstance(fatal, Fatal)
    assert (fatal.phase, fatal.error.parameter) == ("listen", "listen")
    second.close()
    Client(core.address).close()  # the first is still there
