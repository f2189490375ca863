"""Where a core may listen, and who can reach it there."""

from __future__ import annotations

import os
import re
import socket
import stat
from pathlib import Path

import zmq

from .errors import ConfigError

_LOOPBACK = re.compile(r"tcp://(127(\.\d+){3}|localhost|\[::1\]):\d+")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""A byte of a path that is not UTF-8, or that the locale cannot read."""
_TCP = re.compile(r"tcp://([\w.-]+|\*|\[[0-9A-Fa-f:.]+(%\w+)?\]):\d+", re.ASCII)


def check_address(address: str, parameter: str, *, has_keys: bool = False) -> str:
    """`address` if a core may serve there: `ipc://` at any path, `tcp://` on the loopback or with CURVE keys.

    A path is absolute: to ZeroMQ `@name` is a socket without a folder that protects it, and `*` a path that
    it makes up. Raises ConfigError.
    """
    if address.startswith("ipc:///") and not _SURROGATE.search(address):
        limit = zmq.IPC_PATH_MAX_LEN
        if len(os.fsencode(address.removeprefix("ipc://"))) > limit:
            message = f"{parameter}: the path of {address!r} is longer than {limit} bytes"
            raise ConfigError(message, parameter=parameter, value=address, limit=limit)
        return address
    if _LOOPBACK.fullmatch(address) or (has_keys and _TCP.fullmatch(address)):
        return address
    limit_text = "ipc:///path in UTF-8, tcp://127.0.0.1:PORT, or tcp://HOST:PORT with CURVE keys"
    message = f"{parameter} must be {limit_text}; got {address!r}"
    raise ConfigError(message, parameter=parameter, value=address, limit=limit_text)


def is_local(address: str) -> bool:
    """A Unix socket: the kernel itself tells when the other end is gone."""
    return address.startswith("ipc://")


def claim_path(path: Path) -> None:
    """Make ready to listen at this path: in a folder of our own (made if need be), where nobody listens yet.

    Raises ConfigError.
    """
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        message = f"listen: cannot make the folder {str(folder)!r}: {error.strerror}"
        raise ConfigError(message, parameter="listen", value=folder) from error
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
        limit = "a folder of yours with mode 0700"
        message = f"listen: {str(folder)!r} must be {limit}, it has {stat.S_IMODE(status.st_mode):04o}"
        raise ConfigError(message, parameter="listen", value=folder, limit=limit)
    if not path.is_socket():
        if not (path.exists() or path.is_symlink()):
            return
        message = f"listen: {str(path)!r} exists and is no socket"
        raise ConfigError(message, parameter="listen", value=path, limit="a new path")
    if not remove_abandoned(path):
        raise ConfigError(
            f"listen: another process listens on 'ipc://{path}'", parameter="listen", value=path
        )


def remove_abandoned(path: Path) -> bool:
    """Delete a socket's file whose process was killed, or has closed it; False when there is none such.

    One that is bound and does not listen yet is in use.
    """
    if not path.is_socket():
        return False
    # Of the wrong type on purpose: it makes no connection, and only a socket that exists can differ in type.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return True
        except OSError:
            pass
    return False


def check_listening(address: str, parameter: str) -> None:
    """Raise ConfigError unless something listens there: ZeroMQ would wait for it to appear."""
    try:
        if is_local(address):
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(address.removeprefix("ipc://"))
        else:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        message = f"{parameter}: no engine core listens at {address!r}: {error}"
        raise ConfigError(message, parameter=parameter, value=address) from error
