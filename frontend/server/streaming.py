"""Answers that take their time: a client that goes away ends the work, one that reads slowly only its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import CLIENT_GONE, ApiError, as_api_error

_encoder = msgspec.json.Encoder()


def json_response(content: object, request_id: str | None = None) -> Response:
    headers = None if request_id is None else {"x-request-id": request_id}
    return Response(_encoder.encode(content), headers=headers, media_type="application/json")


def event(data: object, name: str | None = None) -> bytes:
    """One server-sent event with `data` as JSON."""
    head = b"data: " if name is None else b"event: " + name.encode() + b"\ndata: "
    return head + _encoder.encode(data) + b"\n\n"


class EventStream(Response):
    """Server-sent events, sent as they come.

    An error before the first event is an answer of its own, with its status code. When the client goes away
    `events` is closed. uvicorn holds at most 64 KiB that the client has not read, then `send` waits; what the
    engine brings meanwhile is merged by its stream.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        request_id: str,
        *,
        on_error: Callable[[ApiError], bytes] = lambda error: event(error.body()),
        end: bytes = b"data: [DONE]\n\n",
    ) -> None:
        headers = {"cache-control": "no-cache", "x-request-id": request_id}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events = events
        self._on_error = on_error
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_when_gone(receive), aclosing(self._events):
            try:
                body = await anext(self._events)
            except Exception as error:
                await as_api_error(error).response()(scope, receive, send)
                return
            head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(head)
            try:
                await send(_part(body))
                async for body in self._events:
                    await send(_part(body))
            except Exception as error:
                await send(_part(self._on_error(as_api_error(error))))
            await send({"type": "http.response.body", "body": self._end})


async def unless_gone(request: Request, answer: Awaitable[Response]) -> Response:
    """`answer`, which is cancelled when the client goes away. The request's body must have been read."""
    async with cancelled_when_gone(request.receive):
        return await answer
    return Response(status_code=CLIENT_GONE)


@asynccontextmanager
async def cancelled_when_gone(receive: Receive) -> AsyncIterator[None]:
    """The block ends early when the client goes away."""
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watching = asyncio.ensure_future(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not is_gone or task.uncancel():
            raise
    finally:
        watching.cancel()


def _part(body: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": True}
