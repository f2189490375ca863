"""The routes, by plain HTTP on an oracle engine: what is asked is answered, what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from headrace.ipc.oracle import oracle_stream

VOCAB_SIZE = 49152
HELLO = [{"role": "user", "content": "Hello"}]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events; it must end as OpenAI's do."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    found: dict[str, Any] = body["error"]
    return found


def expected(prompt: list[int], seed: int, count: int) -> list[int]:
    return oracle_stream(prompt, seed, count, VOCAB_SIZE)


def test_completion_is_exact(http: httpx.Client) -> None:
    prompt = [5, 6, 7]
    body = {"prompt": prompt, "max_tokens": 40, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    whole = http.post("/v1/completions", json=body).json()
    (choice,) = whole["choices"]
    assert choice["token_ids"] == expected(prompt, 3, 40)
    assert choice["finish_reason"] == "length"
    assert whole["usage"]["prompt_tokens"] == 3
    assert whole["usage"]["completion_tokens"] == 40

    chunks = events(http.post("/v1/completions", json={**body, "stream": True}))
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [token for part in parts for token in part["token_ids"]] == expected(prompt, 3, 40)
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]


def test_several_prompts_with_several_choices(http: httpx.Client) -> None:
    prompts = [[1, 2], [3, 4, 5]]
    body = {
        "prompt": prompts,
        "n": 2,
        "max_tokens": 8,
        "seed": 10,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    want = [expected(prompt, 10 + i, 8) for prompt in prompts for i in range(2)]
    choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert [choice["token_ids"] for choice in choices] == want

    streamed: dict[int, list[int]] = {}
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(http.post("/v1/completions", json=stream))
    for chunk in chunks:
        (part,) = chunk["choices"]
        streamed.setdefault(part["index"], []).extend(part["token_ids"])
    assert [streamed[i] for i in range(4)] == want
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 32
    assert last["usage"]["prompt_tokens"] == 5


def test_echo_begins_with_the_prompt(http: httpx.Client) -> None:
    body = {"prompt": ["One, two", "Three"], "max_tokens": 2, "seed": 1, "echo": True}
    texts = [choice["text"] for choice in http.post("/v1/completions", json=body).json()["choices"]]
    assert texts[0].startswith("One, two")
    assert texts[1].startswith("Three")
    chunks = events(http.post("/v1/completions", json={**body, "stream": True}))
    for index, text in enumerate(texts):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == text


@pytest.mark.parametrize("stream", [False, True])
def test_the_prompts_logprobs_are_in_each_choice(http: httpx.Client, stream: bool) -> None:
    """Also where one begins later than the others, or ends before its prompt is computed."""
    prompt = list(range(1900))  # two of these are more than one step
    body = {"prompt": prompt, "max_tokens": 2, "n": 2, "seed": 1, "echo": True, "logprobs": 1}
    body |= {"ignore_eos": True, "return_tokens_as_token_ids": True, "stream": stream}
    for timeout in (None, 0):
        response = http.post("/v1/completions", json={**body, "timeout": timeout})
        assert response.status_code == 200
        parts = [
            part for each in (events(response) if stream else [response.json()]) for part in each["choices"]
        ]
        for index in range(2):
            columns = [part["logprobs"] for part in parts if part["index"] == index]
            named = [token for each in columns for token in each["tokens"]]
            values = [value for each in columns for value in each["token_logprobs"]]
            assert named[:1900] == [f"token_id:{token}" for token in prompt]
            assert [value is None for value in values[:3]] == [True, timeout == 0, timeout == 0]
            assert len(named) == len(values) == (1902 if timeout is None else 1900)


def test_chat_is_the_rendered_prompt(http: httpx.Client) -> None:
    rendered = http.post("/tokenize", json={"messages": HELLO}).json()
    body = {
        "messages": HELLO,
        "max_completion_tokens": 12,
        "seed": 4,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    whole = http.post("/v1/chat/completions", json=body).json()
    assert whole["prompt_token_ids"] == rendered["tokens"]
    assert whole["usage"]["prompt_tokens"] == rendered["count"]
    (choice,) = whole["choices"]
    assert choice["token_ids"] == expected(rendered["tokens"], 4, 12)
    assert choice["message"]["role"] == "assistant"

    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    first, *chunks, last = events(http.post("/v1/chat/completions", json={**body, **options}))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == choice["message"]["content"]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert last["usage"] == {
        **whole["usage"],
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"],
    }
    assert last["choices"] == []


def test_an_answer_may_fill_the_context(http: httpx.Client) -> None:
    """Without max_tokens a chat answer ends where the context does."""
    body = {"messages": HELLO, "ignore_eos": True, "seed": 1}
    whole = http.post("/v1/chat/completions", json=body).json()
    assert whole["usage"]["total_tokens"] == 2048
    assert whole["choices"][0]["finish_reason"] == "length"


def test_an_id_of_ones_own(http: httpx.Client) -> None:
    """As often as one likes; without it each request has a new one. It is also a header."""
    seen = set()
    for given in ("mine", "mine", None, None):
        for stream in (False, True):
            body = {"prompt": "Hi", "max_tokens": 1, "stream": stream, "request_id": given}
            response = http.post("/v1/completions", json=body)
            found = response.headers["x-request-id"]
            assert (events(response)[0] if stream else response.json())["id"] == found
            assert given is None or found == f"cmpl-{given}"
            seen.add(found)
    assert len(seen) == 1 + 4


def test_an_id_in_a_header(http: httpx.Client) -> None:
    """Proxies set it; as with vLLM it comes before the body's."""
    body = {"prompt": "Hi", "max_tokens": 1, "request_id": "body"}
    assert http.post("/v1/completions", json=body, headers={"X-Request-Id": "a 1"}).json()["id"] == "cmpl-a 1"
    refused = http.post("/v1/completions", json=body, headers={"X-Request-Id": "x" * 129})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-request-id")


def test_stop_string_ends_the_text(http: httpx.Client) -> None:
    body = {"prompt": "abc", "max_tokens": 30, "seed": 2, "ignore_eos": True}
    text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = text[20:24]
    (choice,) = http.post("/v1/completions", json={**body, "stop": stop}).json()["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_tokens_there_and_back(http: httpx.Client) -> None:
    text = "The café's price: 3 €."
    answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_models_and_operations(http: httpx.Client) -> None:
    (model,) = http.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("demo", 2048)
    assert http.get("/v1/models/demo").json() == model
    assert error(http.get("/v1/models/other"), 404)["code"] == "model_not_found"
    for path in ("/health", "/health/live", "/health/ready", "/ping"):
        assert http.get(path).status_code == 200
    assert http.post("/ping").status_code == 200
    assert http.get("/load").json() == {"server_load": 0}
    assert set(http.get("/version").json()) == {"version"}
    assert "embeddings" in error(http.post("/v1/embeddings", json={"input": "a"}), 400)["message"]
    assert "/nothing/here" in error(http.get("/nothing/here"), 404)["message"]
    assert "GET /v1/completions" in error(http.get("/v1/completions"), 405)["message"]
    assert error(http.post("/v1/chat/completions", json={}), 400)["param"] == "messages"


GOOD = {"prompt": "Hi", "max_tokens": 2}
BAD = [  # (change to a good request, parameter named)
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 5000}, "n"),
    ({"n": 10**30}, "n"),
    ({"seed": -7}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": [7]}, "stop[0]"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [10**6]}, "prompt_token_ids"),
    ({"prompt": [-1]}, "prompt_token_ids"),
    ({"prompt": [1] * 3000}, "prompt"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_all": True}}, "stream_options.include_all"),
    ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
    ({"use_beam_search": True, "stop": "a"}, "stop"),
    ({"use_beam_search": True, "n": 11}, "n"),
    ({"use_beam_search": True, "echo": True, "logprobs": 1}, "prompt_logprobs"),
    ({"use_beam_search": True, "length_penalty": 99}, "length_penalty"),
    ({"use_beam_search": True, "timeout": -1}, "timeout"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncation_side": "middle"}, "truncation_side"),
    ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ({"return_token_offsets": True}, "return_token_offsets"),
    ({"suffix": "!"}, "suffix"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"tempratur": 1}, "tempratur"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"request_id": "a\nb"}, "request_id"),
    ({"timeout": -1}, "timeout"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"repetition_detection": {"max_pattern_size": 3}}, "repetition_detection"),
]


@pytest.mark.parametrize(("change", "param"), BAD, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_named(http: httpx.Client, change: dict[str, Any], param: str, stream: bool) -> None:
    body = {**GOOD, **({"stream": True} if stream and "stream_options" not in change else {}), **change}
    assert error(http.post("/v1/completions", json=body), 400)["param"] == param


def test_a_prompt_that_is_too_long_has_a_code_of_its_own(http: httpx.Client) -> None:
    for change, code in (({"prompt": [1] * 3000}, "context_length_exceeded"), ({"prompt": ""}, None)):
        assert error(http.post("/v1/completions", json={**GOOD, **change}), 400)["code"] == code


@pytest.mark.parametrize(
    ("messages", "part"),
    [
        ([], "messages"),
        ([{"content": "x"}], "role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}],
            "image_url",
        ),
        ([{"role": "user", "content": 7}], "content"),
        ([{"role": "assistant", "tool_calls": ["x"]}], "tool_calls"),
    ],
)
def test_bad_messages_are_named(http: httpx.Client, messages: list[Any], part: str) -> None:
    found = error(http.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert part in found["message"]
    assert found["param"] == "messages"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b'{"prompt": "\\ud800"}', b'{"a":' * 20000, b"\xff{}", b"NaN"]
)
def test_what_is_not_json(http: httpx.Client, data: bytes) -> None:
    headers = {"content-type": "application/json"}
    assert (
        error(http.post("/v1/completions", content=data, headers=headers), 400)["type"]
        == "invalid_request_error"
    )


def test_other_content_types_are_refused(http: httpx.Client) -> None:
    """A page may send those to a server on its reader's machine without asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        data = json.dumps(GOOD).encode()
        error(http.post("/v1/completions", content=data, headers={"content-type": kind}), 415)


def test_wrong_model_and_template_from_outside(http: httpx.Client) -> None:
    assert error(http.post("/v1/completions", json={**GOOD, "model": "gpt-9"}), 404)["param"] == "model"
    body: dict[str, Any] = {"messages": HELLO, "chat_template": "{{ messages }}"}
    assert error(http.post("/v1/chat/completions", json=body), 400)["param"] == "chat_template"
    body = {"messages": HELLO, "chat_template_kwargs": {"messages": []}}
    assert error(http.post("/v1/chat/completions", json=body), 400)["param"] == "chat_template_kwargs"
