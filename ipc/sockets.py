"""The ZeroMQ sockets between frontends and the core: one ROUTER in the core, one DEALER in each frontend.

One message is one frame. A client's identity is the DEALER's routing id, 16 random bytes, so it survives a
reconnection. Anything that does not decode is reported, never raised through a loop.

Nothing here grows without bound: a frame has a largest size, a client that sends faster than the core reads
is left waiting, and what a client does not read is kept up to a limit, beyond which the client is given up.
"""

from __future__ import annotations

import secrets
from collections import deque
from enum import Enum
from pathlib import Path

import msgspec
import zmq

from .addresses import check_address, claim_path, is_local
from .curve import ClientKeys, ServerKeys, read_allowed, read_public, read_secret
from .decoding import decode
from .errors import ConfigError
from .messages import PROTOCOL_VERSION, FromCore, Refused, ToCore

MAX_TO_CORE_BYTES = 16 << 20
"""A longer frame ends its connection: 4 million prompt tokens are enough."""
MAX_FROM_CORE_BYTES = 64 << 20
MAX_UNDELIVERED_BYTES = 64 << 20
"""Output that is kept for one client which does not read."""
_MAX_UNREAD = 256
"""Messages that ZeroMQ keeps for each client, in each direction."""
_HANDSHAKE_MS = 10_000
_HEARTBEAT_MS = 1000
_HEARTBEAT_TIMEOUT_MS = 3000
_LOCAL_HEARTBEAT_MS = 2000
_LOCAL_HEARTBEAT_TIMEOUT_MS = 10_000
_ZAP = "inproc://zeromq.zap.01"
"""Where libzmq asks whether a key may connect (ZeroMQ RFC 27)."""


class Delivery(Enum):
    """What became of a message to a client; the value is for logs."""

    SENT = "sent"
    """Or kept until the client reads."""
    GONE = "vanished"
    GIVEN_UP = "left too much output unread"
    """All that was kept has been dropped; a `Refused` that says so will follow what is on its way."""


class ServerSocket:
    """The core's end. Every method returns at once."""

    def __init__(self, address: str, keys: ServerKeys | None = None) -> None:
        """Listen; with `keys` only to their clients. Raises ConfigError."""
        check_address(address, "listen", has_keys=keys is not None)
        self._address = address
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = self._context.socket(zmq.ROUTER)
        self._door: _Door | None = None
        self._outboxes: dict[bytes, _Outbox] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)
        try:
            if is_local(address):
                claim_path(Path(address.removeprefix("ipc://")))
            self._set_options()
            if keys is not None:
                self._door = _Door(self._context, self._socket, keys)
            self._socket.bind(address)
        except (zmq.ZMQError, ConfigError) as error:
            self._close(linger=0)
            if isinstance(error, ConfigError):
                raise
            message = f"cannot listen on {address!r}: {error}"
            raise ConfigError(message, parameter="listen", value=address) from error

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """For polling: when one becomes readable, `recv` until None."""
        return [self._socket] if self._door is None else [self._socket, self._door.socket]

    @property
    def has_undelivered(self) -> bool:
        """Something waits for a client to read: call `deliver` now and then."""
        return bool(self._outboxes)

    def recv(self) -> tuple[bytes, ToCore | msgspec.DecodeError] | None:
        """The next (client, message) or (client, why it could not be read); None when there is none."""
        if self._door is not None:
            self._door.answer()
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        client = frames[0]
        if len(frames) != 2:
            return client, msgspec.DecodeError(f"a message is 1 frame, got {len(frames) - 1}")
        try:
            return client, decode(self._decoder, frames[1])
        except msgspec.DecodeError as error:
            return client, error

    def send(self, client: bytes, message: FromCore) -> Delivery:
        """Send to one client, or keep it for one that does not read."""
        frame = self._encoder.encode(message)
        outbox = self._outboxes.get(client)
        if outbox is None:
            if (sent := self._try(client, frame)) is not None:
                return sent
            outbox = self._outboxes[client] = _Outbox()
        if outbox.size + len(frame) > MAX_UNDELIVERED_BYTES:
            text = (
                f"{MAX_UNDELIVERED_BYTES >> 20} MiB of output were not read: its requests have been aborted"
            )
            self._outboxes[client] = _Outbox()
            self._outboxes[client].add(self._encoder.encode(Refused(PROTOCOL_VERSION, text)))
            return Delivery.GIVEN_UP
        outbox.add(frame)
        return Delivery.SENT

    def tell(self, stranger: bytes, message: Refused) -> None:
        """Send if that is possible: nothing is kept for someone who is not a client."""
        if stranger not in self._outboxes:
            self._try(stranger, self._encoder.encode(message))

    def deliver(self) -> list[bytes]:
        """Send what clients have made room for; returns those that are gone."""
        gone: list[bytes] = []
        for client, outbox in list(self._outboxes.items()):
            while outbox.frames and (sent := self._try(client, outbox.frames[0])) is not None:
                if sent is Delivery.GONE:
                    gone.append(client)
                    outbox.frames.clear()
                else:
                    outbox.pop()
            if not outbox.frames:
                del self._outboxes[client]
        return gone

    def take_refused(self) -> str | None:
        """Whence somebody last tried a key that is not known, if anybody has since the last time."""
        if self._door is None:
            return None
        address, self._door.refused = self._door.refused, None
        return address

    def reload_keys(self) -> None:
        """Read again which clients may connect; those that are connected stay. Raises ConfigError."""
        if self._door is not None:
            self._door.reload()

    def close(self) -> None:
        """Close; the last messages (a `Dying`, above all) have a moment to leave."""
        self._close(linger=200)
        if is_local(self._address):
            Path(self._address.removeprefix("ipc://")).unlink(missing_ok=True)

    def _set_options(self) -> None:
        _set_options(self._socket, MAX_TO_CORE_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, _MAX_UNREAD)
        self._socket.setsockopt(zmq.RCVHWM, _MAX_UNREAD)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        # A client that is gone shows as EHOSTUNREACH on the next send to it.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # A Unix socket ends with the process behind it: without heartbeats a client that is merely stopped
        # keeps its connection. A host that has left the network shows in no other way.
        if not is_local(self._address):
            _set_heartbeat(self._socket, _HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS)

    def _try(self, client: bytes, frame: bytes) -> Delivery | None:
        """Send now; None when the client's queue is full."""
        try:
            self._socket.send_multipart((client, frame), zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Delivery.GONE
            raise
        return Delivery.SENT

    def _close(self, linger: int) -> None:
        self._socket.close(linger=linger)
        if self._door is not None:
            self._door.socket.close(linger=0)
        self._context.term()


class ClientSocket:
    """A frontend's end."""

    def __init__(self, address: str, keys: ClientKeys | None = None) -> None:
        """Connect, in the background. Raises ConfigError."""
        check_address(address, "engine_core_address", has_keys=keys is not None)
        curve = None if keys is None else _read_client_keys(keys)
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = self._context.socket(zmq.DEALER)
        _set_options(self._socket, MAX_FROM_CORE_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        if is_local(address):
            _set_heartbeat(self._socket, _LOCAL_HEARTBEAT_MS, _LOCAL_HEARTBEAT_TIMEOUT_MS)
        else:
            _set_heartbeat(self._socket, _HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS)
        self._socket.setsockopt(zmq.ROUTING_ID, secrets.token_bytes(16))
        if curve is not None:
            server, secret = curve
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, server)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))
        failures = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | failures)
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
            return decode(self._decoder, self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def lost_connection(self) -> bool:
        """True once after the connection to the core broke, or was refused for its keys."""
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


class _Outbox:
    """What one client has left unread, encoded."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.size = 0

    def add(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.size += len(frame)

    def pop(self) -> None:
        self.size -= len(self.frames.popleft())


class _Door:
    """Lets in the clients whose key is allowed: libzmq asks for each connection, and the loop answers."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], guarded: zmq.Socket[bytes], keys: ServerKeys
    ) -> None:
        """Make `guarded` a CURVE server. Raises ConfigError."""
        self._keys = keys
        self._allowed = read_allowed(keys.client_keys, "curve_client_keys")
        secret = read_secret(keys.secret_key, "curve_secret_key")
        self.refused: str | None = None
        """The address of the last one whose key was not known."""
        self.socket = context.socket(zmq.REP)
        self.socket.bind(_ZAP)
        guarded.setsockopt(zmq.ZAP_DOMAIN, b"headrace")
        guarded.setsockopt(zmq.CURVE_SERVER, 1)
        guarded.setsockopt(zmq.CURVE_SECRETKEY, secret)

    def answer(self) -> None:
        """Answer what has been asked."""
        while True:
            try:
                version, number, _, address, _, mechanism, *credentials = self.socket.recv_multipart(
                    zmq.NOBLOCK
                )
            except zmq.Again:
                return
            welcome = mechanism == b"CURVE" and credentials[0] in self._allowed
            if not welcome:
                self.refused = address.decode("ascii", "replace")
            status = (b"200", b"OK") if welcome else (b"400", b"unknown key")
            self.socket.send_multipart((version, number, *status, b"", b""))

    def reload(self) -> None:
        self._allowed = read_allowed(self._keys.client_keys, "curve_client_keys")


def _read_client_keys(keys: ClientKeys) -> tuple[bytes, bytes]:
    server = read_public(keys.server_key, "engine_core_curve_server_key")
    return server, read_secret(keys.secret_key, "engine_core_curve_secret_key")


def _set_options(sock: zmq.Socket[bytes], max_bytes: int) -> None:
    sock.setsockopt(zmq.LINGER, 0)
    sock.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    sock.setsockopt(zmq.IPV6, 1)


def _set_heartbeat(sock: zmq.Socket[bytes], interval_ms: int, timeout_ms: int) -> None:
    sock.setsockopt(zmq.HEARTBEAT_IVL, interval_ms)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, timeout_ms)
