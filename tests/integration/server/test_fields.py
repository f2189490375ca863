"""vLLM's further fields of requests, each seen in its effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from .conftest import Server

EOS = 2
TALK = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "It is"}]


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# --- beam search -----------------------------------------------------------------------------------------


def best(http: httpx.Client, prompt: list[int], width: int, length: int, penalty: float) -> list[list[int]]:
    """A plain search that asks for one token's logprobs at a time."""
    beams, done = [(0.0, prompt)], list[tuple[float, list[int]]]()

    def score(beam: tuple[float, list[int]]) -> float:
        return beam[0] / float((len(beam[1]) - (beam[1][-1] == EOS)) ** penalty)

    for _ in range(length):
        body: dict[str, Any] = {"max_tokens": 1, "logprobs": 2 * width, "seed": 0, "ignore_eos": True}
        body |= {"prompt": [tokens for _, tokens in beams], "return_tokens_as_token_ids": True}
        answer = post(http, "/v1/completions", **body)
        grown: list[tuple[float, list[int]]] = []
        for (total, tokens), choice in zip(beams, answer["choices"], strict=True):
            likely = sorted(choice["logprobs"]["top_logprobs"][0].items(), key=lambda item: -item[1])
            for name, logprob in likely[: 2 * width]:
                grown.append((total + logprob, [*tokens, int(name.removeprefix("token_id:"))]))
        done += [beam for beam in grown if beam[1][-1] == EOS]
        beams = sorted((beam for beam in grown if beam[1][-1] != EOS), key=score, reverse=True)[:width]
    return [tokens[len(prompt) :] for _, tokens in sorted(done + beams, key=score, reverse=True)[:width]]


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_beams_are_what_a_plain_search_finds(http: httpx.Client, penalty: float) -> None:
    prompts = [[5, 6, 7], [8, 9]]
    answer = post(
        http,
        "/v1/completions",
        prompt=prompts,
        use_beam_search=True,
        n=3,
        max_tokens=4,
        length_penalty=penalty,
        return_token_ids=True,
        logprobs=2,
        top_p=1,
    )
    found = [choice["token_ids"] for choice in answer["choices"]]
    assert found == [tokens for prompt in prompts for tokens in best(http, prompt, 3, 4, penalty)]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["completion_tokens"] == sum(map(len, found))
    assert answer["usage"]["prompt_tokens"] == 5
    for choice in answer["choices"]:
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
        text = post(http, "/detokenize", tokens=choice["token_ids"])["prompt"]
        assert choice["text"] == text


def test_beams_of_a_chat(http: httpx.Client) -> None:
    body = {"messages": TALK[:1], "use_beam_search": True, "n": 2, "max_tokens": 3, "return_token_ids": True}
    first, second = post(http, "/v1/chat/completions", **body, logprobs=True, top_logprobs=1)["choices"]
    prompt = post(http, "/tokenize", messages=TALK[:1])["tokens"]
    assert [first["token_ids"], second["token_ids"]] == best(http, prompt, 2, 3, 1.0)
    assert first["message"]["role"] == "assistant"
    assert len(first["logprobs"]["content"]) == 3
    refused = http.post("/v1/chat/completions", json={**body, "stream": True})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stream")
    late = post(http, "/v1/chat/completions", **{**body, "max_tokens": 1900, "timeout": 0.2})
    assert {choice["finish_reason"] for choice in late["choices"]} == {"timeout"}


# --- prompts ---------------------------------------------------------------------------------------------


def test_truncation_keeps_either_side(http: httpx.Client) -> None:
    prompt = list(range(100, 120))
    body = {"prompt": prompt, "max_tokens": 1, "return_token_ids": True}

    def kept(**more: Any) -> Any:
        return post(http, "/v1/completions", **body, **more)["choices"][0]["prompt_token_ids"]

    assert kept(truncate_prompt_tokens=5) == prompt[-5:]
    assert kept(truncate_prompt_tokens=5, truncation_side="left") == prompt[-5:]
    assert kept(truncate_prompt_tokens=5, truncation_side="right") == prompt[:5]
    assert kept(truncate_prompt_tokens=50) == prompt
    body |= {"prompt": [7] * 3000, "max_tokens": 48}  # of a context of 2048
    assert kept(truncate_prompt_tokens=-1) == [7] * 2000


def test_the_prompt_s_text_is_told_once(http: httpx.Client) -> None:
    body = {"messages": TALK[:1], "max_tokens": 3, "return_prompt_text": True}
    text = post(http, "/v1/chat/completions", **body)["prompt_text"]
    tokens = post(http, "/tokenize", messages=TALK[:1])["tokens"]
    assert text == post(http, "/detokenize", tokens=tokens)["prompt"]
    first, *others = events(http.post("/v1/chat/completions", json={**body, "stream": True}))
    assert first["prompt_text"] == text
    assert not any("prompt_text" in chunk for chunk in others)


def test_a_continued_message_may_be_echoed(http: httpx.Client) -> None:
    body = {"messages": TALK, "max_tokens": 3, "seed": 1, "echo": True, "continue_final_message": True}
    text = post(http, "/v1/chat/completions", **body)["choices"][0]["message"]["content"]
    plain = post(http, "/v1/chat/completions", **{**body, "echo": False})["choices"][0]["message"]["content"]
    assert text == "It is" + plain
    chunks = events(http.post("/v1/chat/completions", json={**body, "stream": True}))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text


def test_offsets_of_tokens(http: httpx.Client) -> None:
    text = "One, twö three"
    answer = post(http, "/tokenize", prompt=text, return_token_offsets=True)
    pieces = [text[begin:end] for begin, end in answer["token_offsets"]]
    assert "".join(pieces) == text
    assert len(pieces) == answer["count"]
    assert post(http, "/tokenize", prompt=text)["token_offsets"] is None


def test_timings_of_a_request(serve: Callable[..., Server], http: httpx.Client) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 9, "ignore_eos": True}
    stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with serve("--enable-per-request-metrics").client() as client:
        whole = post(client, "/v1/completions", **body)
        chat = post(client, "/v1/chat/completions", messages=TALK[:1], max_tokens=9, ignore_eos=True)
        *_, last = events(client.post("/v1/completions", json=stream))
        for answer in (whole, chat, last):
            times = answer["metrics"]
            assert times["queue_time_ms"] >= 0
            assert times["generation_time_ms"] == pytest.approx(8 * times["mean_itl_ms"])
            seconds = (times["time_to_first_token_ms"] + times["generation_time_ms"]) / 1000
            assert times["tokens_per_second"] == pytest.approx(9 / seconds)
        assert "metrics" not in post(client, "/v1/completions", **body, n=2)
    assert "metrics" not in post(http, "/v1/completions", **body)


# --- chat templates from outside -------------------------------------------------------------------------


def test_a_request_s_chat_template_needs_trust(http: httpx.Client, serve: Callable[..., Server]) -> None:
    template = "{% for message in messages %}[{{ message.content }}]{% endfor %}"
    body = {"messages": TALK[:1], "max_tokens": 1, "return_prompt_text": True}
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = http.post(path, json={"messages": TALK[:1], "chat_template": template})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")
    with serve("--trust-request-chat-template").client() as client:
        answer = post(client, "/v1/chat/completions", **body, chat_template=template)
        assert answer["prompt_text"] == "[Say it]"
        own = post(client, "/v1/chat/completions", **body)["prompt_text"]
        assert own != "[Say it]"
        assert post(client, "/tokenize", messages=TALK[:1], chat_template=template)["count"] == len(
            post(client, "/tokenize", prompt="[Say it]")["tokens"]
        )
        escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        for bad in ("{{ 1 / 0 }}", "{% for %}", "{{ x() }}", escape):
            response = client.post("/v1/chat/completions", json={**body, "chat_template": bad})
            assert response.status_code == 400, bad
            assert "chat template" in response.json()["error"]["message"]


HI = [{"role": "user", "content": "Hi"}]
LONG = "word " * 3000
ODD_SCHEMA = {"name": "f", "schema": {"type": "odd"}}
STRICT = {"name": "f", "strict": True, "parameters": {"type": "object"}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat/completions", {"messages": HI, "max_tokens": 0}, "max_tokens"),
        ("chat/completions", {"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        (
            "chat/completions",
            {"messages": HI, "response_format": {"type": "json_schema", "json_schema": ODD_SCHEMA}},
            "response_format",
        ),
        ("chat/completions", {"messages": HI, "tools": [{"type": "function", "function": STRICT}]}, "tools"),
        ("chat/completions", {"messages": HI, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ("completions", {"prompt": "Hi", "structured_outputs": {"regx": "a"}}, "structured_outputs.regx"),
        ("completions", {"prompt": "Hi", "response_format": {"type": "json_object"}}, "response_format"),
        ("completions", {"prompt": LONG}, "prompt"),
        ("responses", {"input": "Hi", "max_output_tokens": 0}, "max_output_tokens"),
        ("responses", {"input": "Hi", "top_logprobs": 21}, "top_logprobs"),
        ("responses", {"input": LONG}, "input"),
        ("responses", {"input": []}, "input"),
        (
            "responses",
            {"input": "Hi", "text": {"format": {"type": "json_schema"} | ODD_SCHEMA}},
            "text.format",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_field_that_was_sent(
    http: httpx.Client, path: str, body: dict[str, Any], param: str, stream: bool
) -> None:
    """An oracle refuses whatever constrains its tokens."""
    refused = http.post(f"/v1/{path}", json={**body, "stream": stream})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert "max_tokens" not in refused.text or param == "max_tokens"


def test_an_error_of_detokenize_names_its_field(http: httpx.Client) -> None:
    assert http.post("/detokenize", json={"tokens": [10**6]}).json()["error"]["param"] == "tokens"
