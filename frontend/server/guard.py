"""What stands before every route: who may enter, whether requests are still taken, how large they may be."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, unavailable

HEALTH_PATHS = frozenset({"/health", "/health/live", "/health/ready", "/ping"})
"""Open to all: load balancers have no key."""


class Keys:
    """API keys, kept as digests so that comparing takes the same time whatever is offered."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def accept(self, authorization: str) -> bool:
        """`authorization`: the header of that name. "Bearer KEY", or "Basic ..." with the key as the
        password: that is how a browser sends it for the page."""
        scheme, _, offered = authorization.partition(" ")
        key = offered.strip()
        if scheme.lower() == "basic":
            key = _password(key)
        digest = _digest(key)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all, whichever fits
        return any(matches) and scheme.lower() in ("bearer", "basic")


class Gate:
    """Counts the requests inside; once closed it lets in no new ones that would make the engine work."""

    def __init__(self) -> None:
        self.num_inside = 0
        self.is_closed = False
        self._empty = asyncio.Event()

    def close(self) -> None:
        self.is_closed = True
        self._tell_if_empty()

    async def wait_until_empty(self) -> None:
        """Return when it is closed and the last request has left."""
        await self._empty.wait()

    def enter(self) -> None:
        if self.is_closed:
            raise unavailable("the server is shutting down")
        self.num_inside += 1

    def leave(self) -> None:
        self.num_inside -= 1
        self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        if self.is_closed and self.num_inside == 0:
            self._empty.set()


class Guard:
    """ASGI middleware: keys first, then the gate for whatever has a body."""

    def __init__(self, app: ASGIApp, keys: Keys, gate: Gate) -> None:
        self._app = app
        self._keys = keys
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in HEALTH_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            self._gate.enter()
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._gate.leave()

    def _check_key(self, scope: Scope) -> None:
        if self._keys and not self._keys.accept(Headers(scope=scope).get("authorization", "")):
            challenge = {"www-authenticate": 'Bearer, Basic realm="Headrace: the API key is the password"'}
            raise ApiError(401, "invalid API key", code="invalid_api_key", headers=challenge)


async def read_body(request: Request, max_bytes: int, seconds: float) -> bytes:
    """A request's body. Raises ApiError: not JSON, too long, too slow."""
    # A page of any origin may send other types without asking first, also to a server on its user's machine.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the header 'content-type: application/json' is needed, got {kind or 'none'!r}")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_long(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise _too_long(max_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {seconds:g} s"
        raise ApiError(408, message, headers={"connection": "close"}) from None
    return bytes(body)


def _too_long(max_bytes: int) -> ApiError:
    message = f"the body is longer than {max_bytes} bytes"
    return ApiError(413, message, headers={"connection": "close"})  # the rest of it is not read


def _password(credentials: str) -> str:
    try:
        return (
            base64.b64decode(credentials, validate=True).decode("utf-8", "surrogateescape").partition(":")[2]
        )
    except binascii.Error:
        return ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
