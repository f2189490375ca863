"""The access log: a line a request with what it cost, unforgeable, no prompt unasked. Traces: a span each."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from .conftest import Server

Serve = Callable[..., Server]
BODY = {"prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True, "request_id": 'mine" status=500'}


def lines_of(server: Server, *bodies: dict[str, Any]) -> list[str]:
    """What is on standard error after these requests, a failed one and a health check."""
    with server.client() as client:
        for body in bodies:
            client.post("/v1/completions", json=body)
        client.get("/nowhere%0Arequest%20status=200")
        client.get("/health")
    assert server.end() == 0
    assert server.process.stderr is not None
    return server.process.stderr.read().splitlines()


def test_json_lines_have_the_figures_and_no_prompt(serve: Serve) -> None:
    server = serve("--access-log", "--log-format", "json")
    stream = {**BODY, "stream": True}
    first, streamed, bad, missing = map(json.loads, lines_of(server, BODY, stream, {"prompt": "a", "n": -1}))
    for line in (first, streamed):
        assert line["event"] == "request"
        assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
        assert (line["prompt_tokens"], line["completion_tokens"], line["finish"]) == (3, 9, "length")
        assert line["id"] == 'cmpl-mine" status=500'
        assert 0 < line["first_token"] <= line["seconds"]
        assert "prompts" not in line
    assert bad["status"] == 400
    assert missing["status"] == 404


def test_text_lines_cannot_be_forged_and_show_prompts_when_asked(serve: Serve) -> None:
    shown, missing = lines_of(serve("--access-log", "--log-prompts"), BODY)
    assert " request client=127.0.0.1 method=POST path=/v1/completions status=200 " in shown
    assert r'id="cmpl-mine\" status=500"' in shown
    assert 'prompts="[[5, 6, 7]]"' in shown
    assert missing.count(" status=404 ") == 1


def test_a_span_a_request_in_the_caller_s_trace(serve: Serve) -> None:
    collected: queue.Queue[bytes] = queue.Queue()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collected.put(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        server = serve("--otlp-traces-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces")
        trace = "0af7651916cd43dd8448eb211c80319c"
        with server.client(headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"}) as client:
            client.post("/v1/completions", json=BODY)
            client.get("/v1/models")  # nothing for the engine to do
        assert server.end() == 0  # with the last spans sent
        (sent,) = [collected.get(timeout=60)]
        collector.shutdown()
    (spans,) = ExportTraceServiceRequest.FromString(sent).resource_spans
    (span,) = spans.scope_spans[0].spans
    values = {pair.key: pair.value for pair in span.attributes}
    assert (span.name, span.trace_id.hex()) == ("llm_request", trace)
    assert values["gen_ai.usage.prompt_tokens"].int_value == 3
    assert values["gen_ai.usage.completion_tokens"].int_value == 9
    latency = values["gen_ai.latency.time_to_first_token"].double_value
    assert 0 < latency <= values["gen_ai.latency.e2e"].double_value
    assert collected.empty()


def test_a_bad_endpoint_is_refused_at_once(serve: Serve) -> None:
    with pytest.raises(AssertionError, match="otlp_traces_endpoint must be an http://"):
        serve("--otlp-traces-endpoint", "collector:4318")
