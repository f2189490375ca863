"""Whatever a core says, to its client or to whoever starts it: every stream ends, with a typed error."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from headrace import AsyncEngineArgs, AsyncLLM, HeadraceError, SamplingParams
from headrace.frontend.engine_args import resolve
from headrace.frontend.status_lines import StatusLines
from headrace.ipc.errors import EngineDeadError, ErrorInfo
from headrace.ipc.messages import (
    PROTOCOL_VERSION,
    AddRequest,
    Call,
    Dying,
    EngineInfo,
    Fatal,
    Finished,
    FinishReason,
    Hello,
    Progress,
    Ready,
    Refused,
    Reply,
    Started,
    StepOutputs,
    Welcome,
    pack,
)
from headrace.ipc.sockets import ServerSocket
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TIMEOUT = 60.0
fuzz = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
Args = Callable[..., AsyncEngineArgs]


class FakeCore:
    """Welcomes everyone; answers the first request with `frames`, then dies."""

    def __init__(self, args: AsyncEngineArgs, address: str, frames: list[bytes]) -> None:
        self._server = ServerSocket(address)
        self._welcome = Welcome(PROTOCOL_VERSION, resolve(args), EngineInfo(2048, 2000, 1, "0"))
        self._frames = frames
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()
        self._server.close()

    def _serve(self) -> None:
        while not self._stopped.is_set():
            self._server.sockets[0].poll(5)
            received = self._server.recv()
            if received is None:
                continue
            client, message = received
            if isinstance(message, Hello):
                self._server.send(client, self._welcome)
            elif isinstance(message, AddRequest):
                for frame in self._frames:
                    self._server._try(client, frame)
                self._server.send(client, Dying(ErrorInfo("dead", "the end")))
            elif isinstance(message, Call):  # whoever sends requests again one by one asks for its turn
                self._server.send(client, Reply(message.call))


numbers = st.integers(-1, 3)
columns = st.lists(numbers | st.integers(0, 999), max_size=4).map(pack) | st.binary(max_size=9)
finished = st.builds(
    Finished,
    request=numbers,
    reason=st.sampled_from(FinishReason),
    stop_token_id=st.none() | st.integers(-5, 2000),
    error=st.none() | st.builds(ErrorInfo, st.sampled_from(["request", "dead", "overloaded"]), st.text()),
)
started = st.builds(Started, request=numbers, num_cached_tokens=numbers, queued_seconds=st.floats())
steps = st.builds(
    StepOutputs,
    requests=columns,
    tokens=columns,
    started=st.lists(started, max_size=2),
    finished=st.lists(finished, max_size=2),
)
frames = st.one_of(
    steps.map(msgspec.msgpack.encode),
    steps.map(msgspec.msgpack.encode).map(lambda frame: frame[:-2]),
    st.builds(Reply, st.integers(0, 3)).map(msgspec.msgpack.encode),
    st.just(msgspec.msgpack.encode(Refused(PROTOCOL_VERSION, "no"))),
    st.binary(max_size=30),
)


@given(frames=st.lists(frames, max_size=5))
@fuzz
def test_every_stream_ends(
    oracle_args: Args, tmp_path_factory: pytest.TempPathFactory, frames: list[bytes]
) -> None:
    address = f"ipc://{tmp_path_factory.mktemp('fake', numbered=True)}/core"
    core = FakeCore(oracle_args(), address, frames)
    faults: list[dict[str, Any]] = []

    async def read(engine: AsyncLLM, number: int) -> None:
        params = SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
        try:
            async for _ in engine.generate({"prompt_token_ids": [1, 2]}, params, str(number)):
                pass
        except HeadraceError:
            pass

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        async with AsyncLLM(AsyncEngineArgs(engine_core_address=address)) as engine:
            await asyncio.wait_for(asyncio.gather(*(read(engine, i) for i in range(2))), TIMEOUT)

    try:
        asyncio.run(run())
    finally:
        core.stop()
    assert not faults


lines = st.one_of(
    st.binary(max_size=40),
    st.builds(Progress, st.none() | numbers, st.text(max_size=9)).map(msgspec.json.encode),
    st.builds(Fatal, numbers, st.text(), st.builds(ErrorInfo, st.just("dead"), st.text())).map(
        msgspec.json.encode
    ),
    st.just(msgspec.json.encode(Ready("ipc:///x", EngineInfo(1, 1, 1, "")))),
    st.just(b"[" * 3000),
    st.just(b'["Progress", 0, "\xff"]'),
)


@given(said=st.lists(lines, max_size=6), size=st.integers(1, 300))
@fuzz
def test_reports_of_every_kind(said: list[bytes], size: int) -> None:
    data = b"\n".join(said)
    reader, rest = StatusLines(), StatusLines()
    try:
        for start in range(0, len(data), size):
            reader.feed(data[start : start + size])
    except EngineDeadError:
        pass
    rest.keep(data)
    rest.last_words()


def test_a_report_without_end_is_cut_off() -> None:
    reader = StatusLines()
    with pytest.raises(EngineDeadError, match="without end"):
        reader.feed(b"x" * ((1 << 20) + 1))
    for _ in range(100):
        reader.keep(b"x" * 65536)
    assert len(reader._rest) <= 1 << 20
    reader.keep(b"\n" + msgspec.json.encode(Fatal(0, "serving", ErrorInfo("dead", "why"))))
    fatal = reader.last_words()
    assert fatal is not None
    assert fatal.error.message == "why"


def test_a_client_that_was_given_up_comes_back(oracle_args: Args, tmp_path: Path) -> None:
    """A core refuses a client whose output nobody read; the client is another one then, with its requests."""
    address = f"ipc://{tmp_path}/run/core"
    server = ServerSocket(address)
    welcome = Welcome(PROTOCOL_VERSION, resolve(oracle_args()), EngineInfo(2048, 2000, 1, "0"))
    clients: list[bytes] = []
    replayed: list[AddRequest] = []

    def serve() -> None:
        while len(replayed) < 2:
            server.sockets[0].poll(100)
            if (received := server.recv()) is None:
                continue
            client, message = received
            if isinstance(message, Hello):
                clients.append(client)
                server.send(client, welcome)
            elif isinstance(message, AddRequest):
                replayed.append(message)
                if len(replayed) == 1:
                    server.send(client, StepOutputs(pack([message.request]), pack([41])))
                    server.send(client, Refused(PROTOCOL_VERSION, "given up"))
                else:
                    ended = Finished(message.request, FinishReason.LENGTH)
                    server.send(client, StepOutputs(pack([message.request]), pack([42]), finished=[ended]))

    async def run() -> list[int]:
        async with AsyncLLM(AsyncEngineArgs(engine_core_address=address)) as engine:
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            outputs = [o async for o in engine.generate({"prompt_token_ids": [1]}, params, "a")]
            return list(outputs[-1].outputs[0].token_ids)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert asyncio.run(asyncio.wait_for(run(), TIMEOUT)) == [41, 42]
    finally:
        thread.join(TIMEOUT)
        server.close()
    assert clients[0] != clients[1]
    assert replayed[1].generated == pack([41])
