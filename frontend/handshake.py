"""The first words with an engine core, and the wait for its answer: before there is an event loop."""

from __future__ import annotations

import os
import time

import msgspec

from .. import __version__
from ..ipc.curve import ClientKeys
from ..ipc.errors import ConfigError
from ..ipc.messages import PROTOCOL_VERSION, Hello, Refused, Welcome
from ..ipc.sockets import ClientSocket

HANDSHAKE_SECONDS = 10.0
"""For a core that serves already."""
_LOOK_SECONDS = 0.1
"""How often to look whether the core has hung up."""


def client_name() -> str:
    """What this program is called in a core's log."""
    return f"headrace {__version__}, pid {os.getpid()}"


def connect(
    address: str, name: str, keys: ClientKeys | None = None, patience: float = HANDSHAKE_SECONDS
) -> tuple[ClientSocket, Welcome]:
    """Shake hands with the core there, as `name`. A core that still loads its model answers when it has; it
    is given `patience` seconds. Raises ConfigError.
    """
    sock = ClientSocket(address, keys)
    try:
        sock.send(Hello(PROTOCOL_VERSION, name))
        return sock, _await_welcome(sock, address, patience)
    except BaseException:
        sock.close()
        raise


def _await_welcome(sock: ClientSocket, address: str, patience: float) -> Welcome:
    deadline = time.monotonic() + patience
    reason = f"no answer within {patience:g} s"
    try:
        while (left := deadline - time.monotonic()) > 0:
            message = sock.recv(min(left, _LOOK_SECONDS))
            # Its last words may have come since we looked.
            if message is None and sock.lost_connection() and (message := sock.recv()) is None:
                reason = "it hung up: does it use CURVE keys, and are these the right ones?"
                break
            if isinstance(message, Welcome):
                if message.protocol == PROTOCOL_VERSION:
                    return message
                reason = f"it speaks protocol {message.protocol}, this is protocol {PROTOCOL_VERSION}"
                break
            if isinstance(message, Refused):
                reason = message.message
                break
    except msgspec.DecodeError as error:
        reason = f"its answer cannot be read, perhaps it is of another version: {error}"
    message_text = f"engine_core_address: cannot use the engine core at {address!r}: {reason}"
    raise ConfigError(
        message_text, parameter="engine_core_address", value=address, limit=f"protocol {PROTOCOL_VERSION}"
    )
