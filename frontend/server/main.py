"""The server's process: socket, engine and application put together; its end, which loses no answer.

`serve` is the command's action. With several workers the same happens in each of them, see `supervisor.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import uvicorn
import uvloop

from ...ipc.errors import ConfigError, HeadraceError
from ..async_llm import AsyncLLM
from ..engine_args import AsyncEngineArgs
from .app import make_app
from .options import ServerOptions, read_chat_template
from .service import Service

logger = logging.getLogger("headrace")

_BACKLOG = 4096
_KEEP_ALIVE_SECONDS = 60


def serve(options: ServerOptions, engine_args: AsyncEngineArgs, keys: list[str]) -> None:
    """Serve until SIGTERM or SIGINT; exits 0 then, 1 when the engine is gone."""
    logging.basicConfig(level=logging.WARNING, format="headrace: %(message)s")
    listener = bind(options)
    try:
        code = run(listener, options, engine_args, keys)
    except HeadraceError as error:
        print(f"headrace serve: {error}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    finally:
        listener.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)
    sys.exit(code)


def run(listener: socket.socket, options: ServerOptions, args: AsyncEngineArgs, keys: list[str]) -> int:
    """Serve at a bound socket; returns the exit code. Raises HeadraceError when the engine does not start."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # until there is something to finish
    engine = AsyncLLM.from_engine_args(args)
    try:
        service = Service(engine, options, read_chat_template(options))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Server(service, keys).serve_at(listener))
    finally:
        engine.shutdown()


class _Server(uvicorn.Server):
    """uvicorn's, with an end in two steps: refuse what is new, then stop when the rest is done."""

    def __init__(self, service: Service, keys: list[str]) -> None:
        options = service.options
        config = uvicorn.Config(
            make_app(service, keys),
            http="httptools",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs=0 if options.ssl_ca_certs is None else 2,
        )
        super().__init__(config)
        self._service = service
        self._ending: asyncio.Task[None] | None = None

    async def serve_at(self, listener: socket.socket) -> int:
        """Serve until the end; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        engine = self._service.engine
        await engine.check_health()  # from here on it notices its core's death by itself
        gc.collect()
        gc.freeze()  # what lives this long stays: later collections look at requests only
        await self.serve(sockets=[listener])
        return 1 if engine.errored else 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            print(f"headrace: {self._service.model} at {url(listener, self.config.is_ssl)}", flush=True)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it over?"""
        engine = self._service.engine
        if engine.errored:
            logger.error("%s", engine.dead_error)
            return True
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ours are handled by the loop."""
        yield

    def _on_signal(self) -> None:
        if self._ending is not None:
            self.should_exit = self.force_exit = True
            return
        self._ending = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        """Readiness flips and new requests are refused; then the ones inside finish."""
        gate = self._service.gate
        gate.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._service.options.drain_timeout):
                await gate.wait_until_empty()
        if gate.num_inside:
            logger.warning("%d requests did not finish in time", gate.num_inside)
            self.force_exit = True
        self.should_exit = True


def bind(options: ServerOptions) -> socket.socket:
    """The listening socket, not listening yet: until the engine serves, connections are refused.

    Raises ConfigError.
    """
    try:
        if options.uds is not None:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(options.uds)
            return listener
        family, *_, address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by every connection: one whose client has vanished, or reads nothing, ends by itself.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(options.stall_timeout * 1000))
        listener.bind(address)
    except OSError as error:
        where = options.uds or f"{options.host}:{options.port}"
        name = "uds" if options.uds else "port"
        raise ConfigError(f"cannot listen at {where}: {error}", parameter=name, value=where) from error
    return listener


def url(listener: socket.socket, is_ssl: bool) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"{'https' if is_ssl else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
