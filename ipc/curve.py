"""CURVE keys, which encrypt a TCP socket and tell who may use it: made, kept in files, read back.

Only paths travel between processes; a key goes from its file into a socket and nowhere else.
"""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import msgspec
import zmq
from zmq.utils import z85

from .errors import ConfigError

_TEXT_LENGTH = 40
"""Characters of a key in Z85, the form that ZeroMQ's own tools use; 32 bytes."""
_MAX_FILE_BYTES = 1 << 20


class ServerKeys(msgspec.Struct, frozen=True):
    """Where a core finds its keys."""

    secret_key: str
    """File with the core's own secret key."""
    client_keys: str
    """File with the public keys of the clients that may connect, one a line, or a folder of such files
    named `*.public`."""


class ClientKeys(msgspec.Struct, frozen=True):
    """Where a frontend finds its keys."""

    server_key: str
    """File with the core's public key."""
    secret_key: str
    """File with the frontend's own secret key."""


def client_keys(
    server_key: str | None, secret_key: str | None, server_parameter: str, secret_parameter: str
) -> ClientKeys | None:
    """Both or none; the two last are what the caller calls them. Raises ConfigError."""
    if server_key is not None and secret_key is not None:
        return ClientKeys(server_key, secret_key)
    if server_key is None and secret_key is None:
        return None
    message = f"{server_parameter} and {secret_parameter} go together"
    missing = server_parameter if server_key is None else secret_parameter
    raise ConfigError(message, parameter=missing, limit="both or none")


def make_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a new key pair to `name.secret` and `name.public`, for their owner alone; never over old files.

    Makes the folder if need be. Raises ConfigError.
    """
    secret, public = folder / f"{name}.secret", folder / f"{name}.public"
    keys = zmq.curve_keypair()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, key in ((public, keys[0]), (secret, keys[1])):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(key + b"\n")
    except OSError as error:
        message = f"cannot write a key: {error}"
        raise ConfigError(message, parameter="folder", value=folder, limit="a new file") from error
    return secret, public


def read_secret(path: str, parameter: str) -> bytes:
    """The secret key in this file (Z85), which nobody but its owner may read. Raises ConfigError."""
    return _only(_read_keys(Path(path), parameter, secret=True), path, parameter)


def read_public(path: str, parameter: str) -> bytes:
    """The one public key in this file (Z85). Raises ConfigError."""
    return _only(_read_keys(Path(path), parameter), path, parameter)


def read_allowed(path: str, parameter: str) -> frozenset[bytes]:
    """All public keys (32 bytes each) in this file, or in the `*.public` files of this folder.

    Raises ConfigError.
    """
    place = Path(path)
    files = sorted(place.glob("*.public")) if place.is_dir() else [place]
    keys = [key for file in files for key in _read_keys(file, parameter)]
    if not keys:
        raise _refusal(parameter, path, "no key", "at least one public key")
    return frozenset(map(z85.decode, keys))


def _only(keys: list[bytes], path: str, parameter: str) -> bytes:
    if len(keys) != 1:
        raise _refusal(parameter, path, f"{len(keys)} keys", "a file with one key")
    return keys[0]


def _read_keys(path: Path, parameter: str, *, secret: bool = False) -> list[bytes]:
    """The first word of every line that is not empty. What is wrong is told without its content."""
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if secret and mode & 0o077:
                raise _refusal(parameter, path, f"mode {mode:04o}", "a file of mode 0600")
            lines = file.read(_MAX_FILE_BYTES).splitlines()
    except OSError as error:
        raise _refusal(parameter, path, error.strerror or "an error", "a file that can be read") from error
    keys = [words[0] for line in lines if (words := line.split())]
    if not all(map(_is_key, keys)):
        raise _refusal(parameter, path, "something else", f"keys of {_TEXT_LENGTH} characters in Z85")
    return keys


def _is_key(text: bytes) -> bool:
    try:
        return len(text) == _TEXT_LENGTH and len(z85.decode(text)) == 32
    except (KeyError, struct.error):
        return False


def _refusal(parameter: str, path: Path | str, found: str, wanted: str) -> ConfigError:
    message = f"{parameter} must be {wanted}; {str(path)!r} has {found}"
    return ConfigError(message, parameter=parameter, value=path, limit=wanted)
