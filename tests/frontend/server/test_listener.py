"""Where a server listens: what a killed one has left is taken over, what somebody uses is not."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
from headrace.frontend.server.listener import bind
from headrace.frontend.server.options import ServerOptions
from headrace.ipc.errors import ConfigError


def test_the_socket_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with bind(ServerOptions(uds=str(path))) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.listen()
        client.connect(str(path))


@pytest.mark.parametrize("listens", [True, False])
def test_a_socket_in_use_is_left_alone(tmp_path: Path, listens: bool) -> None:
    """A server that still loads its model does not listen yet."""
    path = tmp_path / "socket"
    with bind(ServerOptions(uds=str(path))) as taken, socket.socket(socket.AF_UNIX) as client:
        if listens:
            taken.listen()
        with pytest.raises(ConfigError, match="already in use"):
            bind(ServerOptions(uds=str(path)))
        taken.listen()
        client.connect(str(path))


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="already in use"):
        bind(ServerOptions(uds=str(path)))
    assert stat.S_ISREG(path.stat().st_mode)
    assert path.read_text() == "precious"
