"""A chat template of one's own: what it is shown, and reasoning that its prompt begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

TEMPLATE = """{% for message in messages %}[{{ message.role }}: {{ message.content }}
{%- if message.reasoning_content %} ({{ message.reasoning_content }}){% endif %}
{%- for call in message.tool_calls or () %} {{ call.function.name }} {{ call.function.arguments.a }}
{%- endfor %}]
{% endfor %}{% for tool in tools or () %}({{ tool.function.name }} {{ tool.function.parameters | tojson }})
{% endfor %}{{ mood }}{{ reasoning_effort }}{% if add_generation_prompt %}<think>{% endif %}"""
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def http(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    path = tmp_path_factory.mktemp("template") / "template.jinja"
    path.write_text(TEMPLATE)
    with serve("--chat-template", str(path), "--max-model-len", "512").client() as client:
        yield client


def shown(http: httpx.Client, **body: Any) -> str:
    """The prompt as the model sees it."""
    tokens = http.post("/tokenize", json=body).json()["tokens"]
    text: str = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    return text


def test_messages_are_brought_to_one_form(http: httpx.Client) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}]
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "8"},
    ]
    want = "[system: Be brief.]\n[user: Hello\nthere]\n[assistant:  add 7]\n[tool: 8]\n"
    assert shown(http, messages=messages, add_generation_prompt=False) == want


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_of_earlier_answers_reaches_the_template(http: httpx.Client, name: str) -> None:
    messages = [{"role": "assistant", "content": "8", name: "7 and 1"}, {"role": "user", "content": "Sure?"}]
    prompt = "[assistant: 8 (7 and 1)]\n[user: Sure?]\n"
    assert shown(http, messages=messages, add_generation_prompt=False) == prompt


def test_tools_and_variables_reach_the_template(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [TOOL]}
    prompt = shown(http, **body, chat_template_kwargs={"mood": "good"})
    assert prompt == '[user: Hi]\n(add {"type": "object"})\ngood<think>'
    assert shown(http, messages=body["messages"]) == "[user: Hi]\n<think>"


def test_reasoning_is_told_from_the_answer(http: httpx.Client) -> None:
    """The prompt opens the mark and this model never closes it: all that it says is reasoning."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "seed": 1, "ignore_eos": True}
    message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert message["reasoning"]
    assert message["reasoning"] == message["reasoning_content"]
    assert message["content"] == ""
    streamed = http.post("/v1/chat/completions", json={**body, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message["reasoning"]
    hidden = http.post("/v1/chat/completions", json={**body, "include_reasoning": False}).json()
    assert not {"reasoning", "reasoning_content"} & hidden["choices"][0]["message"].keys()

    asked = {"input": "Hi", "max_output_tokens": 20, "seed": 1, "ignore_eos": True}
    thought, answer = http.post("/v1/responses", json=asked).json()["output"]
    assert thought["content"][0]["text"] == message["reasoning"]
    assert answer["content"][0]["text"] == ""


def test_a_templates_refusal_is_the_clients_error(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"tools": []}}
    refused = http.post("/v1/chat/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "chat_template_kwargs"
