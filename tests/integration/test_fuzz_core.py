"""Whatever arrives at the core's sockets, from whomever: it lives, and other clients' streams stay exact."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

import msgspec
import psutil
import pytest
import zmq
from headrace.ipc.config import EngineConfig
from headrace.ipc.curve import ClientKeys, ServerKeys, make_pair
from headrace.ipc.messages import (
    PROTOCOL_VERSION,
    Abort,
    AddRequest,
    Bye,
    Call,
    CallMethod,
    FinishReason,
    Hello,
    Reply,
    Sampling,
    StepOutputs,
    ThinkingBudget,
    Welcome,
    pack,
    unpack,
)
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.payloads import CoreStart, Daemon
from headrace.ipc.process import Child, spawn
from headrace.ipc.sockets import ClientSocket
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .cores import free_port

TIMEOUT = 60.0
LENGTH = 400
MAX_GROWTH = 256 << 20
"""Bytes that a core may grow by; one frame may have 16 MiB, and the allocator keeps what it had."""
fuzz = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],  # a core that is dead fails whatever comes after
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MakeConfig = Callable[..., EngineConfig]


class Witness:
    """A client that streams all the time, and knows what it should get."""

    def __init__(self, address: str, keys: ClientKeys | None) -> None:
        self._socket = ClientSocket(address, keys)
        self._stream: list[int] = []
        self._number = 0
        self._socket.send(Hello(PROTOCOL_VERSION, "witness"))
        assert isinstance(self._socket.recv(TIMEOUT), Welcome)
        self._start()

    def check(self) -> None:
        """The core answers, and what has been streamed so far is right."""
        self._socket.send(Call(1, "stats"))
        while not isinstance(message := self._recv(), Reply):
            pass
        assert message.stats is not None
        assert message.stats.num_restarts == 0

    def finish(self) -> None:
        """To the end of the stream at work."""
        number = self._number
        while self._number == number:
            self._recv()

    def close(self) -> None:
        self._socket.close()

    def _start(self) -> None:
        self._number += 1
        self._stream.clear()
        self._socket.send(AddRequest(self._number, pack([self._number]), Sampling(seed=self._number), LENGTH))

    def _recv(self) -> Any:
        message = self._socket.recv(TIMEOUT)
        assert message is not None, "the core has gone silent"
        if isinstance(message, StepOutputs):
            assert set(unpack(message.requests)) <= {self._number}
            self._stream += unpack(message.tokens)
            if message.finished:
                assert message.finished[0].reason is FinishReason.LENGTH
                assert self._stream == oracle_stream([self._number], self._number, LENGTH, 1000)
                self._start()
        return message


class Target:
    """A core, a witness, and what an attacker may know."""

    def __init__(self, config: EngineConfig, address: str, folder: Path, *, curve: bool) -> None:
        self.address = address
        self.keys: ClientKeys | None = None
        daemon = Daemon()
        if curve:
            make_pair(folder, "server")
            make_pair(folder, "client")
            keys = ServerKeys(str(folder / "server.secret"), str(folder / "client.public"))
            self.keys = ClientKeys(str(folder / "server.public"), str(folder / "client.secret"))
            daemon = Daemon(keys=keys)
        reading, writing = os.pipe()
        start = CoreStart(config, address, writing, daemon)
        self.child: Child = spawn("core", "headrace.core.main:run", start, pass_fds=(writing,))
        os.close(writing)
        with os.fdopen(reading, "rb") as status:
            assert any(b'"Ready"' in line for line in status)
        self.witness = Witness(address, self.keys)
        self.witness.finish()
        self._process = psutil.Process(self.child.pid)
        self._size = self._process.memory_info().rss

    def survives(self) -> None:
        """After an attack: alive, right, and not much larger."""
        assert self.child.alive, self.child.cause_of_death()
        self.witness.check()
        assert self._process.memory_info().rss - self._size < MAX_GROWTH

    def connect(self) -> socket.socket:
        """A raw connection."""
        if self.address.startswith("ipc://"):
            raw = socket.socket(socket.AF_UNIX)
            raw.connect(self.address.removeprefix("ipc://"))
        else:
            host, _, port = self.address.removeprefix("tcp://").rpartition(":")
            raw = socket.create_connection((host, int(port)))
        raw.settimeout(TIMEOUT)
        return raw

    def close(self) -> None:
        if self.child.alive:
            self.witness.finish()
        self.witness.close()
        self.child.stop(5.0)


@pytest.fixture(scope="module", params=["ipc", "tcp", "curve"])
def target(
    request: pytest.FixtureRequest, make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("target")
    address = f"ipc://{folder}/core" if request.param == "ipc" else f"tcp://127.0.0.1:{free_port()}"
    config = make_config(
        max_model_len=2000, num_gpu_blocks_override=2000, max_num_seqs=8, max_queued_requests=100
    )
    with closing(Target(config, address, folder, curve=request.param == "curve")) as target:
        yield target


# --- what ZeroMQ itself has to stand -----------------------------------------------------------------


def greeting(mechanism: bytes) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def command(name: bytes, body: bytes) -> bytes:
    return struct.pack("!BB", 4, 1 + len(name) + len(body)) + bytes([len(name)]) + name + body


READY = command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x06DEALER")
PREFIXES = [
    b"",
    greeting(b"NULL"),
    greeting(b"CURVE"),
    greeting(b"PLAIN"),
    greeting(b"NULL") + READY,
    greeting(b"CURVE") + command(b"HELLO", b"\1\0" + bytes(192)),
    greeting(b"NULL") + READY + b"\x02" + struct.pack("!Q", 2**63),  # a frame of 8 EiB
    greeting(b"NULL") + READY + b"\x02" + struct.pack("!Q", (16 << 20) + 1),
]


@given(prefix=st.sampled_from(PREFIXES), noise=st.binary(max_size=300), cut=st.integers(0, 300))
@fuzz
def test_bytes_that_are_not_zeromq(target: Target, prefix: bytes, noise: bytes, cut: int) -> None:
    data = prefix + noise
    with target.connect() as raw:
        try:
            raw.sendall(data[: max(1, len(data) - cut)])
            if cut % 2:
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(4096):
                    pass
        except TimeoutError:
            raise
        except OSError:
            pass  # it has hung up
        target.survives()
    target.survives()


def test_many_connections_that_say_nothing(target: Target) -> None:
    raws = [target.connect() for _ in range(100)]
    for i, raw in enumerate(raws):
        raw.sendall(PREFIXES[i % len(PREFIXES)])
    target.survives()
    for raw in raws:
        raw.close()
    target.survives()


# --- what the core has to stand ----------------------------------------------------------------------

integers = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(-3, 300), st.just(2**31 - 1))
floats = st.floats() | st.floats(0, 2)
columns = st.binary(max_size=64) | st.lists(st.integers(0, 999), max_size=20).map(pack)
sampling_fields: dict[str, st.SearchStrategy[Any]] = {
    "temperature": floats,
    "top_p": floats,
    "top_k": integers,
    "min_p": floats,
    "seed": integers,
    "presence_penalty": floats,
    "frequency_penalty": floats,
    "repetition_penalty": floats,
    "min_tokens": integers,
    "eos_token_id": st.none() | integers,
    "stop_token_ids": st.lists(integers, max_size=4),
    "bias_tokens": columns,
    "bias_values": st.binary(max_size=64),
    "allowed_token_ids": columns,
    "bad_words": st.lists(st.lists(integers, max_size=3), max_size=3),
    "thinking": st.none() | st.builds(ThinkingBudget, integers, integers, integers),
    "skip_reading_prefix_cache": st.booleans(),
    "grammar": st.none() | st.text(max_size=20),
    "logprobs": st.none() | integers,
    "prompt_logprobs": st.none() | integers,
    "logprob_token_ids": st.lists(integers, max_size=4),
}
# All of them at once are hardly ever good; some of them are, and reach the worker.
samplings = st.fixed_dictionaries({}, optional=sampling_fields).map(lambda given: Sampling(**given))
seconds = st.none() | st.floats()
requests = st.builds(
    AddRequest,
    request=integers,
    prompt=columns,
    sampling=st.just(Sampling()) | samplings,
    max_tokens=integers,
    n=st.just(1) | integers,
    priority=integers,
    cache_salt=st.text(max_size=5),
    queue_timeout=seconds,
    first_token_timeout=seconds,
    total_timeout=seconds,
    generated=st.just(b"") | columns,
)
arguments = st.dictionaries(
    st.text(max_size=5)
    | st.sampled_from(["method", "mode", "level", "tags", "prefix", "reset_running_requests"]),
    st.text(max_size=5) | integers | st.booleans() | st.none() | st.lists(st.text(max_size=5), max_size=2),
    max_size=3,
)
methods = st.sampled_from([*get_args(CallMethod), "stats", "ping"]) | st.text(max_size=20)


def is_allowed(call: Call) -> bool:
    """These stop the whole engine for whoever may ask, the witness included."""
    return call.method not in ("pause_generation", "sleep") or not {"mode", "level"} >= set(call.arguments)


messages = st.one_of(
    requests,
    st.builds(Abort, st.lists(integers, max_size=5)),
    st.builds(Call, integers, methods, arguments).filter(is_allowed),
    st.builds(Hello, st.just(PROTOCOL_VERSION) | integers, st.text(max_size=200)),
    st.just(Bye()),
)
values = st.recursive(
    st.none() | st.booleans() | integers | floats | st.text(max_size=10) | st.binary(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)
names = st.sampled_from(["Hello", "AddRequest", "Abort", "Call", "Bye", "Welcome", "StepPlan"])


@st.composite
def torn(draw: st.DrawFn) -> bytes:
    """A good frame of which a byte is wrong, or the end missing, or something too much."""
    frame = bytearray(msgspec.msgpack.encode(draw(messages)))
    place = draw(st.integers(0, len(frame) - 1))
    match draw(st.integers(0, 2)):
        case 0:
            frame[place] = draw(st.integers(0, 255))
        case 1:
            del frame[place:]
        case _:
            frame[place:place] = draw(st.binary(max_size=8))
    return bytes(frame)


frames = st.one_of(
    messages.map(msgspec.msgpack.encode),
    torn(),
    values.map(msgspec.msgpack.encode),
    st.tuples(names, values, values).map(msgspec.msgpack.encode),
    st.binary(max_size=50),
)
HELLO = msgspec.msgpack.encode(Hello(PROTOCOL_VERSION, "fuzzer"))


def attack(target: Target, parts: list[list[bytes]], *, hello: bool, identity: bytes | None = None) -> None:
    """Send these as a client would; then make sure that all of it has been handled."""
    with zmq.Context[zmq.Socket[bytes]]() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        if identity is not None:
            sock.setsockopt(zmq.ROUTING_ID, identity)
        if target.keys is not None:
            secret = Path(target.keys.secret_key).read_bytes().strip()
            sock.setsockopt(zmq.CURVE_SERVERKEY, Path(target.keys.server_key).read_bytes().strip())
            sock.setsockopt(zmq.CURVE_SECRETKEY, secret)
            sock.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))
        sock.connect(target.address)
        if hello:
            sock.send(HELLO)
        for frames in parts:
            sock.send_multipart(frames)
        sock.send(b"the last one")  # answered by Refused, whatever came before
        sock.setsockopt(zmq.RCVTIMEO, int(1000 * TIMEOUT))
        while b"Refused" not in sock.recv()[:10]:
            pass
        target.survives()


@given(
    hello=st.booleans(),
    parts=st.lists(
        st.lists(frames, min_size=1, max_size=1) | st.lists(frames, min_size=1, max_size=3), max_size=8
    ),
    replays=st.integers(0, 2),
)
@fuzz
def test_messages_of_every_kind(target: Target, hello: bool, parts: list[list[bytes]], replays: int) -> None:
    attack(target, parts * (1 + replays), hello=hello)


def test_every_field_of_sampling_is_fuzzed() -> None:
    assert sampling_fields.keys() == set(Sampling.__struct_fields__)


@given(message=requests)
@fuzz
def test_requests_of_every_kind(target: Target, message: AddRequest) -> None:
    attack(target, [[msgspec.msgpack.encode(message)]], hello=True)


def test_a_frame_beyond_the_limit_costs_its_connection(target: Target) -> None:
    ours = ClientSocket(target.address, target.keys)
    ours.send(Hello(PROTOCOL_VERSION, "large"))
    assert isinstance(ours.recv(TIMEOUT), Welcome)
    ours.send(AddRequest(1, bytes(17 << 20), Sampling(), 5))
    while not ours.lost_connection():
        target.survives()
    ours.close()


def test_a_flood_is_left_waiting(target: Target) -> None:
    """More than the core can take in at once, much of it bad, and nothing of the answers is read."""
    small = [msgspec.msgpack.encode(Call(1, "stats")), b"\xff", HELLO] * 1000
    large = [msgspec.msgpack.encode(AddRequest(1, bytes(1 << 20), Sampling(), 5))] * 100
    attack(target, [[frame] for frame in small + large], hello=True)


def test_the_largest_n_of_a_long_prompt(target: Target) -> None:
    frame = msgspec.msgpack.encode(AddRequest(0, bytes(4 * 1900), Sampling(), 50, 16384))
    attack(target, [[frame]] * 20, hello=True)
