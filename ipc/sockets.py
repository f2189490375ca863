"""The ZeroMQ sockets between frontends and the core: one ROUTER in the core, one DEALER in each frontend.

One message is one frame. A client's identity is the DEALER's routing id, 16 random bytes, so it survives a
reconnection. Anything that does not decode is reported, never raised through a loop.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import stat
from pathlib import Path

import msgspec
import zmq

from .errors import ConfigError
from .messages import FromCore, ToCore

MAX_FRAME_BYTES = 64 << 20
"""A longer frame is cut off by ZeroMQ with its connection: 16 million prompt tokens are enough."""
_HEARTBEAT_MS = 2000
_LOOPBACK = re.compile(r"tcp://(127(\.\d+){3}|localhost|\[::1\]):\d+")


def _set_options(sock: zmq.Socket[bytes]) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.SNDHWM, 0)
    sock.setsockopt(zmq.RCVHWM, 0)
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    sock.setsockopt(zmq.IPV6, 1)
    sock.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5 * _HEARTBEAT_MS)


def check_address(address: str, parameter: str) -> str:
    """`address` if it is one that a core may listen on: `ipc://` anywhere, `tcp://` on the loopback only.

    Raises ConfigError.
    """
    if address.startswith("ipc://"):
        limit = zmq.IPC_PATH_MAX_LEN
        if len(os.fsencode(address.removeprefix("ipc://"))) > limit:
            message = f"{parameter}: the path of {address!r} is longer than {limit} bytes"
            raise ConfigError(message, parameter=parameter, value=address, limit=limit)
        return address
    if _LOOPBACK.fullmatch(address):
        return address
    limit_text = "ipc:///path or tcp://127.0.0.1:PORT"
    message = f"{parameter} must be {limit_text}, got {address!r}"
    raise ConfigError(message, parameter=parameter, value=address, limit=limit_text)


class ServerSocket:
    """The core's end."""

    def __init__(self, address: str) -> None:
        check_address(address, "listen")
        if address.startswith("ipc://"):
            _make_private(Path(address.removeprefix("ipc://")))
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = self._context.socket(zmq.ROUTER)
        _set_options(self._socket)
        # A client that is gone shows as EHOSTUNREACH on the next send to it.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            message = f"cannot listen on {address!r}: {error}"
            raise ConfigError(message, parameter="listen", value=address) from error
        self._address = address
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """For polling."""
        return self._socket

    def recv(self) -> tuple[bytes, ToCore | msgspec.DecodeError] | None:
        """The next (client, message) or (client, why it could not be read); None when there is none."""
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        client = frames[0]
        if len(frames) != 2:
            return client, msgspec.DecodeError(f"a message is 1 frame, got {len(frames) - 1}")
        try:
            return client, self._decoder.decode(frames[1])
        except msgspec.DecodeError as error:
            return client, error

    def send(self, client: bytes, message: FromCore) -> bool:
        """Send to one client; False when the client is gone."""
        try:
            self._socket.send_multipart((client, self._encoder.encode(message)), zmq.NOBLOCK)
        except zmq.Again:
            return (
                False  # cannot happen without a high-water mark; a client that causes it is as good as gone
            )
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return False
            raise
        return True

    def close(self) -> None:
        # Give the last messages (a `Dying`, above all) a moment to leave.
        self._socket.close(linger=200)
        self._context.term()
        if self._address.startswith("ipc://"):
            Path(self._address.removeprefix("ipc://")).unlink(missing_ok=True)


class ClientSocket:
    """A frontend's end."""

    def __init__(self, address: str) -> None:
        check_address(address, "engine_core_address")
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = self._context.socket(zmq.DEALER)
        _set_options(self._socket)
        self._socket.setsockopt(zmq.ROUTING_ID, secrets.token_bytes(16))
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)

    @property
    def descriptors(self) -> tuple[int, int]:
        """Edge-triggered: after one becomes readable, `recv` until None and look at `lost_connection`.
        Sending can swallow the edge, so do the same after a `send`."""
        return self._socket.fileno(), self._monitor.fileno()

    def send(self, message: ToCore) -> None:
        self._socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def recv(self, timeout: float = 0) -> FromCore | None:
        """The next message, or None after `timeout` seconds. Raises msgspec.DecodeError."""
        if timeout and not self._socket.poll(int(timeout * 1000)):
            return None
        try:
            return self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def lost_connection(self) -> bool:
        """True once after the connection to the core broke."""
        lost = False
        while self._monitor.poll(0):
            self._monitor.recv_multipart()
            lost = True
        return lost

    def close(self) -> None:
        """Close; what was just sent has 0.1 s to leave. Idempotent."""
        if self._socket.closed:
            return
        self._socket.disable_monitor()
        self._monitor.close(linger=0)  # or the context waits for it for ever
        self._socket.close(linger=100)
        self._context.term()


def _make_private(path: Path) -> None:
    """Make the socket's folder if need be, readable by its owner alone; refuse one that others can enter."""
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        limit = "a folder of yours with mode 0700"
        message = f"listen: {str(folder)!r} must be {limit}, it has {stat.S_IMODE(status.st_mode):04o}"
        raise ConfigError(message, parameter="listen", value=folder, limit=limit)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # left by a core that was killed
            return
    raise ConfigError(f"listen: another process listens on 'ipc://{path}'", parameter="listen", value=path)
