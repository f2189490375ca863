"""One line for each HTTP request when it is over: what it was, how it ended, what it cost and when."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...ipc.logs import fields
from .generation import Run
from .guard import HEALTH_PATHS

logger = logging.getLogger("headrace.access")

_QUIET = HEALTH_PATHS | {"/metrics", "/stats"}
"""Asked for all the time, by machines."""


class AccessLog:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, shows_prompts: bool) -> None:
        self._app = app
        self._shows_prompts = shows_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _QUIET:
            await self._app(scope, receive, send)
            return
        status = 0
        begun = time.monotonic()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._log(scope, status, time.monotonic() - begun)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        client = scope.get("client")
        run: Run | None = scope.get("state", {}).get("run")
        facts: dict[str, Any] = {
            "client": client[0] if client else "-",
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": seconds,
        }
        if run is not None:
            facts |= run.summary()
            if self._shows_prompts:
                facts["prompts"] = run.prompts
        logger.info("request", extra=fields(**facts))
