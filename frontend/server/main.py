"""`headrace serve`: one server process, or a supervisor of several."""

from __future__ import annotations

from pathlib import Path

from ...ipc.addresses import remove_abandoned
from ...ipc.exit_codes import ExitCode
from ..engine_args import AsyncEngineArgs
from . import server
from .listener import bind
from .options import ServerOptions
from .supervisor import Supervisor


def serve(options: ServerOptions, engine_args: AsyncEngineArgs, keys: list[str]) -> None:
    """Serve until SIGTERM or SIGINT, then exit."""
    server.live(options, lambda: _serve(options, engine_args, keys))


def _serve(options: ServerOptions, engine_args: AsyncEngineArgs, keys: list[str]) -> ExitCode:
    listener = bind(options)  # first: a taken port should not cost a model's load
    try:
        if options.workers > 1:
            return Supervisor(listener, options, engine_args, keys).run()
        return server.run(listener, options, engine_args, keys)
    finally:
        listener.close()
        if options.uds is not None:
            remove_abandoned(Path(options.uds))  # it may be another server's by now
