"""The listening socket: where clients knock."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from ...ipc.addresses import remove_abandoned
from ...ipc.errors import ConfigError
from .options import ServerOptions


def bind(options: ServerOptions) -> socket.socket:
    """The listening socket, not listening yet: until the engine serves, connections are refused.

    Raises ConfigError.
    """
    try:
        if options.uds is not None:
            remove_abandoned(Path(options.uds))
            return _bound(socket.socket(socket.AF_UNIX), options.uds)
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by every connection: one whose client has vanished, or reads nothing, ends by itself.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(options.stall_timeout * 1000))
        return _bound(listener, address)
    except OSError as error:
        where = options.uds or f"{options.host}:{options.port}"
        name = "uds" if options.uds else "port"
        raise ConfigError(f"cannot listen at {where}: {error}", parameter=name, value=where) from error


def _bound(listener: socket.socket, address: Any) -> socket.socket:
    try:
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


def url(listener: socket.socket, is_ssl: bool) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{'https' if is_ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def announce(listener: socket.socket, options: ServerOptions, what: str) -> None:
    """The one line that a server prints, once it serves."""
    print(f"headrace: {what} at {url(listener, options.ssl_certfile is not None)}", flush=True)
