"""The access log: one line a request, with what it cost; no line can be forged, no prompt is told unasked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

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
