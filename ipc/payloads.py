"""How each process is started: the JSON payload that its parent hands it (`ipc/process.py`)."""

from __future__ import annotations

import msgspec

from .config import EngineConfig
from .curve import ServerKeys
from .logs import LogFormat


class CheckerStart(msgspec.Struct, frozen=True):
    """How a checker of grammars is started: the payload of its process."""

    config: EngineConfig
    fd: int
    """Its end of the pipe."""


class WorkerStart(msgspec.Struct, frozen=True):
    """How a worker is started: the payload of its process."""

    config: EngineConfig
    rank: int
    fd: int
    """Its end of the pipe to the core."""
    rendezvous: str
    """A file for the ranks to find each other through; empty for a single rank."""
    odometers: int
    """The descriptor of the memory in which it counts how far it has come (`ipc.odometer`)."""


class Daemon(msgspec.Struct, frozen=True):
    """How a core that is nobody's child is reached, watched and ended."""

    keys: ServerKeys | None = None
    """CURVE keys of its socket."""
    drain_seconds: float = 30.0
    """How long requests at work may take to end after SIGTERM."""
    log_format: LogFormat = "text"
    ready_fd: int | None = None
    """Gets the `Ready` message as one JSON line, and is closed then."""
    notify_socket: str | None = None
    """systemd's NOTIFY_SOCKET: a path, or `@` and an abstract name."""


class CoreStart(msgspec.Struct, frozen=True):
    """How a core is started: the payload of its process."""

    config: EngineConfig
    address: str
    status_fd: int | None
    """A pipe for `FromStarting` messages, one JSON line each; its end of file means that the core is gone."""
    daemon: Daemon | None = None
    """Set for a core that is nobody's child."""
