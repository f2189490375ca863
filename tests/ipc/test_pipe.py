"""The pipe between core and worker: framing under every kind of tearing, and how its end shows."""

from __future__ import annotations

import os
import random
import resource
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest
from headrace.ipc.messages import Allocate, FromWorker, Progress, StepPlan, StepResult, ToWorker
from headrace.ipc.pipe import Pipe, PipeClosedError, frame, poll_pipes, socket_pair
from hypothesis import given, settings
from hypothesis import strategies as st

Ends = tuple[Pipe[ToWorker, FromWorker], Pipe[FromWorker, ToWorker]]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = socket_pair()
    pair: Ends = (Pipe(ours, FromWorker), Pipe(theirs, ToWorker))
    yield pair
    for end in pair:
        end.close()


def plan(number: int, size: int = 0) -> StepPlan:
    return StepPlan(number, b"", [], b"\0" * size, None, None)


def test_messages_arrive_whole_and_in_order(ends: Ends) -> None:
    core, worker = ends
    for number in range(100):
        core.send(plan(number, number * 100))
    core.send(Allocate(3, 4))
    for number in range(100):
        assert worker.recv(1) == plan(number, number * 100)
    assert worker.recv(1) == Allocate(3, 4)
    assert worker.recv(0) is None


def test_posting_never_waits(ends: Ends) -> None:
    core, worker = ends
    messages = [plan(number, 1 << 20) for number in range(20)]
    for message in messages:
        core.post_frame(frame(msgspec.msgpack.encode(message)))
    assert not core.flush()  # 20 MB fit into no socket
    received: list[ToWorker] = []
    while len(received) < len(messages):
        if (arrived := worker.recv(0)) is None:
            core.flush()
        else:
            received.append(arrived)
    assert received == messages
    assert core.flush()
    worker.close()
    with pytest.raises(PipeClosedError):
        core.post_frame(frame(msgspec.msgpack.encode(messages[0])))


def test_a_frame_beyond_the_limit_is_refused() -> None:
    ours, theirs = socket_pair()
    core: Pipe[ToWorker, FromWorker] = Pipe(ours, FromWorker, 64)
    longest = Progress(0, "x" * 51)
    data = frame(msgspec.msgpack.encode(longest))
    assert len(data) == 4 + 64
    theirs.sendall(data)
    assert core.recv(1) == longest
    theirs.sendall(b"\x41\0\0\0")
    assert poll_pipes([core], 1) == [0]
    with pytest.raises(msgspec.DecodeError, match="65 bytes"):
        core.recv(1)
    core.close()
    theirs.close()


def test_frames_torn_anywhere() -> None:
    ours, theirs = socket_pair()
    worker: Pipe[FromWorker, ToWorker] = Pipe(theirs, ToWorker)
    messages = [plan(number, number) for number in range(20)]
    data = b"".join(frame(msgspec.msgpack.encode(message)) for message in messages)
    cut = random.Random(0)
    received: list[ToWorker] = []
    while data:
        size = cut.randint(1, 30)
        ours.sendall(data[:size])
        data = data[size:]
        while (message := worker.recv(0)) is not None:
            received.append(message)
    assert received == messages
    ours.close()
    worker.close()


@given(st.binary(max_size=100) | st.binary(max_size=60).map(frame))
@settings(deadline=None, database=None, derandomize=True)
def test_garbage_is_an_error_or_waits_for_more(data: bytes) -> None:
    ours, theirs = socket_pair()
    core: Pipe[ToWorker, FromWorker] = Pipe(ours, FromWorker, max_bytes=1 << 20)
    theirs.sendall(data)
    theirs.close()
    with pytest.raises((msgspec.DecodeError, PipeClosedError)):
        _read_all(core)
    core.close()


def _read_all(pipe: Pipe[ToWorker, FromWorker]) -> None:
    while pipe.recv(1) is not None:
        pass


def test_a_message_larger_than_any_buffer(ends: Ends) -> None:
    core, worker = ends
    large = plan(1, 40 << 20)
    received: list[ToWorker | None] = []
    reader = threading.Thread(target=lambda: received.append(worker.recv(20)))
    reader.start()
    core.send(large)
    reader.join()
    assert received == [large]


def test_both_may_send_at_once(ends: Ends) -> None:
    """Neither reads before it has sent: they would wait for each other if sending did not take in."""
    core, worker = ends
    answer, question = StepResult(1, b"\0" * (20 << 20)), plan(1, 20 << 20)
    heard: list[ToWorker | None] = []

    def work() -> None:
        worker.send(answer)
        heard.append(worker.recv(20))

    other = threading.Thread(target=work, daemon=True)
    other.start()
    core.send(question)
    assert core.recv(20) == answer
    other.join(20)
    assert heard == [question]


def test_what_was_said_before_the_end_is_heard(ends: Ends) -> None:
    core, worker = ends
    worker.send(Progress(0, "last words"))
    worker.close()
    assert core.recv(1) == Progress(0, "last words")
    with pytest.raises(PipeClosedError):
        core.recv(1)
    with pytest.raises(PipeClosedError):
        core.send(plan(1))


def test_poll_sees_data_buffers_and_ends(ends: Ends) -> None:
    core, worker = ends
    assert poll_pipes([core, worker], 0) == []
    worker.send(Progress(0, "one"))
    worker.send(Progress(0, "two"))
    assert poll_pipes([core, worker], 1) == [0]
    core.recv(1)  # takes in both, returns one
    assert core.has_buffered()
    assert poll_pipes([worker, core], 0) == [1]
    core.recv(1)
    assert poll_pipes([core, worker], 0) == []
    core.close()
    assert poll_pipes([worker], 1) == [0]


def test_descriptors_beyond_those_of_select() -> None:
    """A process with a thousand connections has none below 1024 left."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 1101:
        pytest.skip("this machine does not allow 1101 descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    pair = socket_pair()
    for number, sock in enumerate(pair):
        os.dup2(sock.fileno(), 1099 + number)
        sock.close()
    core: Pipe[ToWorker, FromWorker] = Pipe(socket.socket(fileno=1099), FromWorker)
    worker: Pipe[FromWorker, ToWorker] = Pipe(socket.socket(fileno=1100), ToWorker)
    thread = threading.Thread(target=core.send, args=(plan(1, 10 << 20),))  # has to wait for room
    thread.start()
    assert worker.recv(5) == plan(1, 10 << 20)
    thread.join()
    worker.send(StepResult(1, b""))
    assert poll_pipes([core], 5) == [0]
    core.close()
    worker.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, most))


def test_an_unreadable_frame_is_an_error(ends: Ends) -> None:
    core, worker = ends
    worker.send_frame(frame(b"\xc1"))
    with pytest.raises(msgspec.DecodeError):
        core.recv(1)


def test_the_pair_is_nameless() -> None:
    ours, theirs = socket_pair()
    with ours, theirs:
        assert ours.family == socket.AF_UNIX
        assert ours.getsockname() == ""
