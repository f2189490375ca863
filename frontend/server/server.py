"""One server process: the engine and the application put together, and an end that loses no answer."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NoReturn

import uvicorn
import uvloop

from ...ipc import logs
from ...ipc.errors import ConfigError, EngineUnhealthyError, HeadraceError
from ...ipc.exit_codes import ExitCode
from ..async_llm import AsyncLLM
from ..engine_args import AsyncEngineArgs
from .app import make_app
from .board import Board
from .connections import protocol
from .listener import announce
from .options import ServerOptions, read_chat_template
from .service import Service

logger = logging.getLogger("headrace")

_BACKLOG = 4096
_KEEP_ALIVE_SECONDS = 60


def live(options: ServerOptions, work: Callable[[], ExitCode]) -> NoReturn:
    """A process of the server: do the work and exit with its code; an error of ours is one line."""
    logs.configure(options.log_format, logging.WARNING)
    logging.getLogger("headrace.access").setLevel(logging.INFO if options.access_log else logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(ExitCode.DONE))  # until there is something to finish
    try:
        code = work()
    except HeadraceError as error:
        print(f"headrace serve: {error}", file=sys.stderr)
        code = ExitCode.CONFIG if isinstance(error, ConfigError) else ExitCode.FAULT
    sys.exit(code)


def run(
    listener: socket.socket,
    options: ServerOptions,
    args: AsyncEngineArgs,
    keys: list[str],
    ready: int | None = None,
    board: Board | None = None,
) -> ExitCode:
    """Serve at a bound socket until SIGTERM or SIGINT.

    Once it serves it writes a byte to the descriptor `ready`, or announces itself where there is none. Raises
    HeadraceError when the engine does not start.
    """
    engine = AsyncLLM.from_engine_args(args)
    try:
        service = Service(engine, options, read_chat_template(options), board)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_Server(service, keys, ready).serve_at(listener))
    finally:
        engine.shutdown()


class _Server(uvicorn.Server):
    """uvicorn's, with an end in two steps: refuse what is new, then stop when the rest is done."""

    def __init__(self, service: Service, keys: list[str], ready: int | None) -> None:
        options = service.options
        config = uvicorn.Config(
            make_app(service, keys),
            http=protocol(options.body_timeout, options.stall_timeout),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            # Once all answers are made: for clients that are still to read the end of theirs.
            timeout_graceful_shutdown=max(round(options.stall_timeout), 1),
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            ssl_ca_certs=options.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_NONE if options.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        )
        super().__init__(config)
        self._service = service
        self._ready = ready
        self._ending: asyncio.Task[None] | None = None

    async def serve_at(self, listener: socket.socket) -> ExitCode:
        """Serve until the end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        engine = self._service.engine
        with suppress(EngineUnhealthyError):  # it recovers
            await engine.check_health()  # from here on it notices its core's death by itself
        gc.collect()
        gc.freeze()  # what lives this long stays: later collections look at requests only
        await self.serve(sockets=[listener])
        if engine.errored:
            return ExitCode.FAULT
        if self._service.gate.num_inside == 0:
            return ExitCode.DONE
        logging.getLogger("uvicorn.error").disabled = True  # a traceback for each would say nothing new
        return ExitCode.CUT_OFF

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            os.write(self._ready, b"\n")
        else:
            for listener in sockets or ():
                announce(listener, self._service.options, self._service.model)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: is it over?"""
        engine = self._service.engine
        if engine.errored:
            logger.error("%s", engine.dead_error)
            return True
        if (board := self._service.board) is not None and counter % 10 == 0:
            board.write(engine.own_metrics())
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The loop handles them."""
        yield

    def _on_signal(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end())
        else:
            self.should_exit = self.force_exit = True

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
