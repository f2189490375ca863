"""The application: every route, behind the guard."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from . import chat, completions, metrics, openapi, operations, page, responses, tokens
from .access import AccessLog
from .errors import on_error
from .guard import Guard, Keys
from .service import Service

ENDPOINTS = [
    *completions.ENDPOINTS,
    *chat.ENDPOINTS,
    *responses.ENDPOINTS,
    *tokens.ENDPOINTS,
    *operations.ENDPOINTS,
    *metrics.ENDPOINTS,
]


def make_app(service: Service, keys: Sequence[str]) -> Starlette:
    origins = [origin.strip() for origin in service.options.allowed_origins.split(",") if origin.strip()]
    middleware = [Middleware(Guard, keys=Keys(keys), gate=service.gate)]
    if origins:  # before the guard: a browser asks for permission without the key
        cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        middleware.insert(0, cors)
    if (endpoint := service.options.otlp_traces_endpoint) is not None:
        from .tracing import Tracing, exporting_to  # noqa: PLC0415 - an extra of its own

        traced = Middleware(Tracing, provider=exporting_to(endpoint), model=service.model)
        middleware.insert(0, traced)
    if service.options.access_log:
        middleware.insert(0, Middleware(AccessLog, shows_prompts=service.options.log_prompts))
    return Starlette(
        routes=[
            *(endpoint.route(service) for endpoint in ENDPOINTS),
            openapi.route(ENDPOINTS),
            *page.routes(),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: on_error},  # no such route, or not this method
    )
