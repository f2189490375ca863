"""Endpoint: a route as its module declares it; the application and its OpenAPI schema are made from these."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from .errors import as_api_error, as_bad_body
from .guard import read_body
from .protocol import Body
from .service import Service


class Endpoint(NamedTuple):
    """`handler(service, request, body)`; the body is None where there is none."""

    method: str
    path: str
    handler: Callable[[Service, Request, Any], Awaitable[Response]]
    summary: str
    body: type[Body] | None = None

    def route(self, service: Service) -> Route:
        decode = None if self.body is None else _decoder(self.body)

        async def endpoint(request: Request) -> Response:
            options = service.options
            body: Body | None = None
            try:
                if decode is not None:
                    body = decode(await read_body(request, options.max_body_bytes, options.body_timeout))
                return await self.handler(service, request, body)
            except Exception as error:
                return as_api_error(error, None if body is None else body.renamed()).response()

        return Route(self.path, endpoint, methods=[self.method])


def _decoder(kind: type[Body]) -> Callable[[bytes], Body]:
    decoder = msgspec.json.Decoder(kind)
    known = dict.fromkeys(kind.__struct_fields__)

    def decode(data: bytes) -> Body:
        try:
            return decoder.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            raise as_bad_body(error, known) from None

    return decode
