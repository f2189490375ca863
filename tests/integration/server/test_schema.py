"""The schema at /openapi.json, and what schemathesis makes of it: nothing is answered by 5xx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

ROUTES = {
    "/v1/completions": {"post"},
    "/v1/chat/completions": {"post"},
    "/v1/responses": {"post"},
    "/v1/embeddings": {"post"},
    "/v1/models": {"get"},
    "/v1/models/{name}": {"get"},
    "/tokenize": {"post"},
    "/detokenize": {"post"},
    "/health": {"get"},
    "/health/live": {"get"},
    "/health/ready": {"get"},
    "/ping": {"get", "post"},
    "/load": {"get"},
    "/version": {"get"},
}


@pytest.fixture(scope="module")
def api(serve: Callable[..., Any]) -> Any:
    """A server whose answers are short, whatever is asked."""
    server = serve("--max-model-len", "64")
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_route_is_described(api: Any) -> None:
    paths = api.raw_schema["paths"]
    assert {path: set(methods) for path, methods in paths.items()}.items() >= ROUTES.items()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ROUTES)
def test_nothing_is_answered_by_5xx(api: Any, path: str, mode: GenerationMode) -> None:
    for method in ROUTES[path]:
        operation = api[path][method.upper()]
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # every string is a good name

        @hypothesis.settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            case.call_and_validate(checks=[not_a_server_error])

        ask()
