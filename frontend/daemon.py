"""The engine core as a daemon: what its command line and its environment say, checked before it starts."""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

from ..ipc.curve import ServerKeys, read_allowed, read_secret
from ..ipc.errors import ConfigError
from ..ipc.logs import LogFormat
from ..ipc.payloads import Daemon


def daemon_options(
    *,
    curve_secret_key: str | None,
    curve_client_keys: str | None,
    drain_timeout: float,
    log_format: LogFormat,
    ready_fd: int | None,
    environment: MutableMapping[str, str],
) -> Daemon:
    """The options as the core gets them; takes systemd's variables out of `environment`, which are meant for
    one process only. Raises ConfigError."""
    if not (0 <= drain_timeout < math.inf):
        limit = "a finite number of seconds >= 0"
        message = f"drain-timeout must be {limit}, got {drain_timeout}"
        raise ConfigError(message, parameter="drain-timeout", value=drain_timeout, limit=limit)
    if ready_fd is not None:
        _check_descriptor(ready_fd)
    notify_socket = environment.pop("NOTIFY_SOCKET", None)
    return Daemon(
        keys=_keys(curve_secret_key, curve_client_keys),
        drain_seconds=drain_timeout,
        log_format=log_format,
        ready_fd=ready_fd,
        notify_socket=notify_socket or None,
    )


def _keys(secret: str | None, clients: str | None) -> ServerKeys | None:
    """Both or none; read once here, so that a mistake is told before a model is loaded."""
    if secret is None and clients is None:
        return None
    if secret is None or clients is None:
        name = "curve-secret-key" if secret is None else "curve-client-keys"
        message = f"{name}: a core with CURVE keys needs --curve-secret-key and --curve-client-keys"
        raise ConfigError(message, parameter=name, limit="both or none")
    read_secret(secret, "curve-secret-key")
    read_allowed(clients, "curve-client-keys")
    return ServerKeys(str(Path(secret).absolute()), str(Path(clients).absolute()))


def _check_descriptor(number: int) -> None:
    try:
        os.fstat(number)
    except (OSError, OverflowError) as error:
        message = f"ready-fd: {number} is not an open descriptor"
        raise ConfigError(message, parameter="ready-fd", value=number) from error
