"""CURVE keys: their files, and who gets through a door that asks for them."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from headrace.ipc.curve import ClientKeys, ServerKeys, make_pair, read_allowed, read_public, read_secret
from headrace.ipc.errors import ConfigError
from headrace.ipc.messages import Call, Reply
from headrace.ipc.sockets import ClientSocket, Delivery, ServerSocket

Join = Callable[..., ClientSocket]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with the pairs `server`, `client` and `stranger`; `client` may connect."""
    folder = tmp_path / "keys"
    for name in ("server", "client", "stranger"):
        make_pair(folder, name)
    return folder


@pytest.fixture
def server(keys: Path) -> Iterator[ServerSocket]:
    server = ServerSocket("tcp://*:0", ServerKeys(str(keys / "server.secret"), str(keys / "client.public")))
    yield server
    server.close()


@pytest.fixture
def join(server: ServerSocket, keys: Path) -> Iterator[Join]:
    """`join(secret="client", server="server")`: a client with the keys of these names."""
    endpoint = server.sockets[0].getsockopt_string(zmq.LAST_ENDPOINT)
    address = f"tcp://127.0.0.1:{endpoint.rpartition(':')[2]}"
    clients: list[ClientSocket] = []

    def make(secret: str | None = "client", server: str = "server") -> ClientSocket:
        paths = (str(keys / f"{server}.public"), str(keys / f"{secret}.secret"))
        clients.append(ClientSocket(address, None if secret is None else ClientKeys(*paths)))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def greets(server: ServerSocket, client: ClientSocket) -> bool:
    """Whether the client reaches the core and the core it; False once its connection has failed."""
    client.send(Call(1, "ping"))
    poller = zmq.Poller()
    for sock in server.sockets:
        poller.register(sock, zmq.POLLIN)
    for _ in range(1000):
        poller.poll(10)
        if (received := server.recv()) is not None:
            assert received[1] == Call(1, "ping")
            assert server.send(received[0], Reply(1)) is Delivery.SENT
            return client.recv(5) == Reply(1)
        if client.lost_connection():
            return False
    raise AssertionError("neither an answer nor a refusal")


def test_a_known_key_gets_through(server: ServerSocket, join: Join) -> None:
    assert greets(server, join())


@pytest.mark.parametrize(
    "who", [{"secret": "stranger"}, {"secret": None}, {"server": "stranger"}], ids=["key", "none", "server"]
)
def test_nobody_else_does(server: ServerSocket, join: Join, who: dict[str, str | None]) -> None:
    assert not greets(server, join(**who))
    refused = server.take_refused()
    assert (refused is not None and refused.endswith("127.0.0.1")) == (who == {"secret": "stranger"})
    assert greets(server, join())
    assert server.take_refused() is None


def test_keys_are_read_again(server: ServerSocket, join: Join, keys: Path) -> None:
    before = join()
    assert greets(server, before)
    (keys / "client.public").write_bytes(
        (keys / "stranger.public").read_bytes() + b"\n" + (keys / "server.public").read_bytes()
    )
    server.reload_keys()
    assert greets(server, join(secret="stranger"))
    assert not greets(server, join())
    assert greets(server, before)  # who is in, stays in
    (keys / "client.public").write_bytes(b"")
    with pytest.raises(ConfigError, match="at least one public key"):
        server.reload_keys()
    assert greets(server, join(secret="stranger"))


def test_files_are_for_their_owner_alone(keys: Path) -> None:
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys.iterdir()} == {0o600}
    public, secret = (
        read_public(str(keys / "client.public"), "x"),
        read_secret(str(keys / "client.secret"), "x"),
    )
    assert zmq.curve_public(secret) == public
    with pytest.raises(ConfigError, match="File exists"):
        make_pair(keys, "client")
    assert read_secret(str(keys / "client.secret"), "x") == secret


def test_a_folder_of_keys(keys: Path) -> None:
    assert len(read_allowed(str(keys), "x")) == 3
    (keys / "client.public").write_bytes(b"")
    assert len(read_allowed(str(keys), "x")) == 2


@pytest.mark.parametrize(
    ("content", "mode", "complaint"),
    [
        (b"", 0o600, "0 keys"),
        (b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7", 0o640, "mode 0640"),
        (b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf", 0o600, "something else"),
        (b"#" * 40, 0o600, "something else"),
        (b"\xff" * 40, 0o600, "something else"),
        (b"rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7\n" * 2, 0o600, "2 keys"),
        (None, 0, "No such file"),
    ],
)
def test_a_bad_secret_key_is_told_without_it(
    tmp_path: Path, content: bytes | None, mode: int, complaint: str
) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(ConfigError, match=complaint) as caught:
        read_secret(str(path), "curve_secret_key")
    assert caught.value.parameter == "curve_secret_key"
    assert "rM>" not in str(caught.value)
