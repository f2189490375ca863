"""Routes for whoever runs the server: models, health, load, version; and the ones that do not exist here."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ... import __version__
from .endpoints import Endpoint
from .errors import ApiError, unavailable
from .service import Service
from .streaming import json_response


async def models(service: Service, request: Request, body: None) -> Response:
    return json_response({"object": "list", "data": [_model(service)]})


async def model(service: Service, request: Request, body: None) -> Response:
    service.check_model(request.path_params["name"])
    return json_response(_model(service))


async def live(service: Service, request: Request, body: None) -> Response:
    """The process works."""
    return Response()


async def ready(service: Service, request: Request, body: None) -> Response:
    """New requests are welcome."""
    if service.gate.is_closed:
        raise unavailable("the server is shutting down")
    return await health(service, request, body)


async def health(service: Service, request: Request, body: None) -> Response:
    """The engine answers."""
    if reason := await service.why_unhealthy():
        raise unavailable(reason)
    return Response()


async def load(service: Service, request: Request, body: None) -> Response:
    """Requests that this process is working on."""
    return json_response({"server_load": service.gate.num_inside})


async def version(service: Service, request: Request, body: None) -> Response:
    return json_response({"version": __version__})


async def no_embeddings(service: Service, request: Request, body: None) -> Response:
    raise ApiError(400, f"{service.model!r} generates text; this server makes no embeddings", param="model")


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "headrace",
        "root": service.engine.config.model,
        "parent": None,
        "max_model_len": service.engine.max_model_len,
    }


ENDPOINTS = [
    Endpoint("GET", "/v1/models", models, "The model served here, as a list"),
    Endpoint("GET", "/v1/models/{name:path}", model, "The model of this name"),
    Endpoint("POST", "/v1/embeddings", no_embeddings, "Always refused"),
    Endpoint("GET", "/health", health, "200 when the engine answers, 503 otherwise"),
    Endpoint("GET", "/health/live", live, "200 while the process works"),
    Endpoint("GET", "/health/ready", ready, "200 while new requests are welcome, 503 otherwise"),
    Endpoint("GET", "/ping", health, "As /health"),
    Endpoint("POST", "/ping", health, "As /health"),
    Endpoint("GET", "/load", load, "Requests being worked on"),
    Endpoint("GET", "/version", version, "The version of Headrace"),
]
