"""OpenTelemetry: one span for each request that makes the engine work, continuing the caller's trace."""

from __future__ import annotations

import time

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .generation import Run

_NAMES = {
    "id": "gen_ai.request.id",
    "prompt_tokens": "gen_ai.usage.prompt_tokens",
    "completion_tokens": "gen_ai.usage.completion_tokens",
    "cached_tokens": "gen_ai.usage.cached_tokens",
    "finish": "gen_ai.response.finish_reasons",
    "queued": "gen_ai.latency.time_in_queue",
    "first_token": "gen_ai.latency.time_to_first_token",
    "mean_inter_token": "gen_ai.latency.time_per_output_token",
}
"""`Run.summary`'s names to the attributes', vLLM's where it has one."""


def exporting_to(endpoint: str) -> TracerProvider:
    """Spans go to this OTLP address over HTTP, from a thread, and what is left of them at the end."""
    provider = TracerProvider(resource=Resource.create({"service.name": "headrace"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return provider


class Tracing:
    """ASGI middleware: spans of requests that have a `Run`."""

    def __init__(self, app: ASGIApp, provider: TracerProvider, model: str) -> None:
        self._app = app
        self._tracer = provider.get_tracer("headrace")
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.time_ns()
        try:
            await self._app(scope, receive, send)
        finally:
            run: Run | None = scope.get("state", {}).get("run")
            if run is not None:
                self._tell(scope, run, begun)

    def _tell(self, scope: Scope, run: Run, begun: int) -> None:
        span = self._tracer.start_span(
            "llm_request", extract(Headers(scope=scope)), SpanKind.SERVER, start_time=begun
        )
        ended = time.time_ns()
        summary = run.summary()
        span.set_attributes({_NAMES[name]: value for name, value in summary.items()})
        span.set_attribute("gen_ai.response.model", self._model)
        span.set_attribute("gen_ai.latency.e2e", (ended - begun) / 1e9)
        if summary["finish"] == "aborted":
            span.set_status(Status(StatusCode.ERROR, "aborted"))
        span.end(ended)
