"""The sockets between clients and core."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from headrace.ipc.addresses import check_address, remove_abandoned
from headrace.ipc.errors import ConfigError, ErrorInfo
from headrace.ipc.messages import Bye, Call, Hello, Refused, Reply, ToCore
from headrace.ipc.sockets import (
    MAX_TO_CORE_BYTES,
    MAX_UNDELIVERED_BYTES,
    ClientSocket,
    Delivery,
    ServerSocket,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerSocket]:
    server = ServerSocket(f"ipc://{tmp_path}/folder/core")
    yield server
    server.close()


@pytest.fixture
def client(server: ServerSocket, tmp_path: Path) -> Iterator[ClientSocket]:
    client = ClientSocket(f"ipc://{tmp_path}/folder/core")
    yield client
    client.close()


def receive(server: ServerSocket) -> tuple[bytes, ToCore | msgspec.DecodeError]:
    assert server.sockets[0].poll(5000)
    received = server.recv()
    assert received is not None
    return received


def test_there_and_back(server: ServerSocket, client: ClientSocket) -> None:
    assert server.recv() is None
    assert client.recv() is None
    client.send(Call(1, "ping"))
    identity, message = receive(server)
    assert len(identity) == 16
    assert message == Call(1, "ping")
    assert server.send(identity, Reply(1)) is Delivery.SENT
    assert client.recv(5) == Reply(1)


def test_a_client_that_is_gone(server: ServerSocket, client: ClientSocket, tmp_path: Path) -> None:
    assert server.send(b"nobody", Reply(1)) is Delivery.GONE
    other = ClientSocket(f"ipc://{tmp_path}/folder/core")
    other.send(Hello(1, "other"))
    identity, _ = receive(server)
    other.close()
    other.close()
    client.send(Bye())
    receive(server)
    while server.send(identity, Reply(1)) is Delivery.SENT:  # until the closed connection shows
        pass


def test_the_loss_of_the_core_shows(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/core"
    server, client = ServerSocket(address), ClientSocket(address)
    client.send(Bye())
    receive(server)
    assert not client.lost_connection()
    server.close()
    client._monitor.poll(5000)
    assert client.lost_connection()
    assert not client.lost_connection()
    client.close()


def test_a_client_that_does_not_read_is_given_up_at_a_limit(server: ServerSocket, tmp_path: Path) -> None:
    message = Refused(2, "x" * (1 << 20))
    with zmq.Context[zmq.Socket[bytes]]() as context, context.socket(zmq.DEALER) as lazy:
        lazy.setsockopt(zmq.RCVHWM, 1)
        lazy.connect(f"ipc://{tmp_path}/folder/core")
        lazy.send(msgspec.msgpack.encode(Bye()))
        identity, _ = receive(server)
        sent = 0
        while (delivery := server.send(identity, message)) is Delivery.SENT:
            sent += 1
            assert all(outbox.size <= MAX_UNDELIVERED_BYTES for outbox in server._outboxes.values())
        assert delivery is Delivery.GIVEN_UP
        assert sent << 20 > MAX_UNDELIVERED_BYTES  # kept by us, beside what ZeroMQ and the kernel hold
        assert server.has_undelivered
        last = b""
        while b"were not read" not in last:
            assert server.deliver() == []
            if lazy.poll(10):
                last = lazy.recv()
        assert not server.has_undelivered
        assert server.send(identity, Refused(2, "more")) is Delivery.SENT
        assert msgspec.msgpack.decode(lazy.recv(), type=Refused) == Refused(2, "more")


def test_what_is_kept_arrives_in_order(server: ServerSocket, tmp_path: Path) -> None:
    with zmq.Context[zmq.Socket[bytes]]() as context, context.socket(zmq.DEALER) as lazy:
        lazy.setsockopt(zmq.RCVHWM, 1)
        lazy.setsockopt(zmq.LINGER, 0)
        lazy.connect(f"ipc://{tmp_path}/folder/core")
        lazy.send(msgspec.msgpack.encode(Bye()))
        identity, _ = receive(server)

        def fill() -> int:
            sent = 0
            while not server.has_undelivered or sent % 100:
                message = Reply(sent, error=ErrorInfo("request", "x" * 10_000))
                assert server.send(identity, message) is Delivery.SENT
                sent += 1
            return sent

        for number in range(fill()):
            server.deliver()
            assert lazy.poll(5000)
            assert msgspec.msgpack.decode(lazy.recv(), type=Reply).call == number
        fill()
        lazy.close()
        gone: list[bytes] = []
        while not gone:
            assert server.recv() is None  # as the loop does; ZeroMQ notes the end of a connection there
            gone = server.deliver()
        assert gone == [identity]
        assert not server.has_undelivered


def test_last_words_leave_before_the_socket_closes(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/core"
    server, client = ServerSocket(address), ClientSocket(address)
    client.send(Bye())
    identity, _ = receive(server)
    server.send(identity, Refused(1, "good night"))
    server.close()
    assert client.recv(5) == Refused(1, "good night")
    client.close()


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o701])
def test_the_folder_is_private(server: ServerSocket, tmp_path: Path, mode: int) -> None:
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode 0700, it has {mode:04o}"):
        ServerSocket(f"ipc://{open_folder}/core")


def test_a_frame_to_the_core_has_a_largest_size(server: ServerSocket, tmp_path: Path) -> None:
    with zmq.Context[zmq.Socket[bytes]]() as context, context.socket(zmq.DEALER) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.RECONNECT_IVL, -1)
        monitor = raw.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        raw.connect(f"ipc://{tmp_path}/folder/core")
        raw.send(bytes(MAX_TO_CORE_BYTES))
        assert isinstance(receive(server)[1], msgspec.DecodeError)
        assert not monitor.poll(0)
        raw.send(bytes(MAX_TO_CORE_BYTES + 1))
        assert monitor.poll(20_000)
        assert server.recv() is None
        raw.disable_monitor()
        monitor.close(linger=0)


def test_a_client_that_connects_anew_takes_its_name_along(server: ServerSocket, tmp_path: Path) -> None:
    """The old connection may look alive for a while when a network has broken."""
    with zmq.Context[zmq.Socket[bytes]]() as context:
        socks = [context.socket(zmq.DEALER) for _ in range(2)]
        for number, sock in enumerate(socks):
            sock.setsockopt(zmq.LINGER, 0)
            sock.routing_id = b"the same"
            sock.connect(f"ipc://{tmp_path}/folder/core")
            sock.send(msgspec.msgpack.encode(Call(number, "ping")))
            assert receive(server) == (b"the same", Call(number, "ping"))
        assert server.send(b"the same", Reply(7)) is Delivery.SENT
        assert socks[1].poll(20_000)
        assert msgspec.msgpack.decode(socks[1].recv(), type=Reply) == Reply(7)
        for sock in socks:
            sock.close()


def test_one_core_per_address(server: ServerSocket, client: ClientSocket, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another process listens"):
        ServerSocket(f"ipc://{tmp_path}/folder/core")
    client.send(Bye())
    assert receive(server)[1] == Bye()


def test_a_socket_left_by_a_killed_core_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "core"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    server = ServerSocket(f"ipc://{path}")
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    server.close()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thesis"
    match kind:
        case "file":
            path.write_text("years of work")
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists and is no socket") as caught:
        ServerSocket(f"ipc://{path}")
    assert caught.value.parameter == "listen"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "address", ["ipc:///run/x/core", "tcp://127.0.0.1:5000", "tcp://localhost:1", "tcp://[::1]:1"]
)
def test_good_addresses(address: str) -> None:
    assert check_address(address, "listen") == address


@pytest.mark.parametrize(
    "address",
    [
        *("tcp://0.0.0.0:5000", "tcp://*:1", "tcp://127.0.0.1", "http://x", "", "ipc:///" + "x" * 200),
        "ipc:///caf\udce9",
        *("ipc://@open", "ipc://*", "ipc://core", "ipc://"),  # to ZeroMQ the first two are no paths
    ],
)
def test_bad_addresses_name_the_parameter(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_address(address, "listen")
    assert caught.value.parameter == "listen"
    assert caught.value.value == address
    assert caught.value.limit is not None


def test_a_path_is_free_once_its_socket_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    assert not remove_abandoned(path)
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        assert not remove_abandoned(path)
        taken.listen(0)
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(path))  # the last for which there is room: another one would wait
            assert not remove_abandoned(path)
    assert path.exists()
    assert remove_abandoned(path)
    assert not path.exists()
