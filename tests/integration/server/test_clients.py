"""The clients that people have, unchanged: openai, langchain-openai and curl, on the demo model."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

HELLO: Any = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
SUM: Any = [{"role": "user", "content": "What is 2 + 3? Use the function."}]


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=12)
    is_capital: bool


@pytest.fixture
def client(demo: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", timeout=120, max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == "demo"


def test_completion_and_its_stream(client: openai.OpenAI) -> None:
    prompt = "The capital of France is"
    whole = client.completions.create(model="demo", prompt=prompt, max_tokens=6, temperature=0)
    assert "Paris" in whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    stream = client.completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert last.usage is not None
    assert last.usage.completion_tokens == 6


def test_chat_and_its_stream(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="demo", messages=HELLO, max_completion_tokens=8, temperature=0
    )
    answer = whole.choices[0].message
    assert answer.role == "assistant"
    assert answer.content
    assert "Paris" in answer.content
    stream = client.chat.completions.create(
        model="demo", messages=HELLO, max_completion_tokens=8, temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == answer.content


def test_a_tool_call_and_the_answer_to_it(client: openai.OpenAI) -> None:
    more: Any = {"tool_choice": "required", "parallel_tool_calls": False, "temperature": 0, "max_tokens": 60}
    whole = client.chat.completions.create(model="demo", messages=SUM, tools=[ADD], **more)
    choice = whole.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}

    answer = {"role": "tool", "tool_call_id": call.id, "content": "5"}
    messages = [*SUM, choice.message.model_dump(exclude_none=True), answer]
    after = client.chat.completions.create(model="demo", messages=messages, tools=[ADD], max_tokens=4)
    assert after.choices[0].message.content


def test_a_tool_call_that_is_streamed(client: openai.OpenAI) -> None:
    more: Any = {"tool_choice": {"type": "function", "function": {"name": "add"}}, "temperature": 0}
    name, arguments, ids, reason = "", "", set(), None
    stream = client.chat.completions.create(
        model="demo", messages=SUM, tools=[ADD], max_tokens=60, stream=True, **more
    )
    for chunk in stream:
        reason = chunk.choices[0].finish_reason or reason
        for call in chunk.choices[0].delta.tool_calls or ():
            assert call.index == 0
            assert call.function is not None
            ids |= {call.id} - {None}
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    assert (name, reason, len(ids)) == ("add", "tool_calls", 1)
    assert set(json.loads(arguments)) == {"a", "b"}


def test_structured_output(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="demo", messages=HELLO, response_format=City, max_tokens=60, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, City)
    one_of: Any = {"structured_outputs": {"choice": ["Rome", "Paris"]}}
    chosen = client.chat.completions.create(model="demo", messages=HELLO, temperature=0, extra_body=one_of)
    assert chosen.choices[0].message.content == "Paris"


def test_errors_have_the_clients_types(client: openai.OpenAI) -> None:
    def ask(**more: Any) -> None:
        client.chat.completions.create(**({"model": "demo", "messages": HELLO, "max_tokens": 1} | more))

    with pytest.raises(openai.BadRequestError) as bad:
        ask(temperature=7)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError):
        ask(temperature=7, stream=True)
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="demo", input="x")
    broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError):
        ask(response_format=broken)


def test_a_structural_tag_as_response_format(client: openai.OpenAI) -> None:
    tag = {"type": "tag", "begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]{3}"}, "end": "</n>"}
    form: Any = {"type": "structural_tag", "format": tag}
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, max_tokens=30, extra_body={"response_format": form}
    )
    content = answer.choices[0].message.content
    assert content is not None
    assert re.fullmatch("<n>[0-9]{3}</n>", content)


def test_langchain(demo: Any) -> None:
    model = ChatOpenAI(
        model="demo",
        base_url=f"{demo.url}/v1",
        api_key=SecretStr("none"),
        temperature=0,
        max_completion_tokens=60,
        max_retries=0,
    )
    question = HELLO[0]["content"]
    streamed = "".join(chunk.text for chunk in model.bind(max_tokens=8).stream(question))
    assert "Paris" in streamed
    assert isinstance(model.with_structured_output(City).invoke(question), City)
    forced = model.bind_tools([ADD], tool_choice="add").invoke("What is 2 + 3?")
    (call,) = forced.tool_calls
    assert (call["name"], set(call["args"])) == ("add", {"a", "b"})


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(demo: Any) -> None:
    body = json.dumps({"messages": HELLO, "max_tokens": 4, "temperature": 0, "stream": True})
    command = ["curl", "-sSN", f"{demo.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    done = subprocess.run([*command, "-d", body], capture_output=True, text=True, timeout=60, check=True)
    *events, end = [line for line in done.stdout.splitlines() if line]
    assert end == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in events]
    whole = httpx.post(
        f"{demo.url}/v1/chat/completions", json=json.loads(body) | {"stream": False}, timeout=60
    )
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole.json()["choices"][0]["message"]["content"]


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    more: Any = {"temperature": 0, "max_tokens": 4, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(model="demo", messages=HELLO, **more).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    assert "".join(one.token for one in content) == whole.message.content
    for one in content:
        assert [other.token for other in one.top_logprobs].count(one.token) == 1
        assert one.logprob == max(other.logprob for other in one.top_logprobs) <= 0
        assert len(one.top_logprobs) == 3
        assert bytes(one.bytes or []).decode() == one.token
    streamed: list[Any] = []
    for chunk in client.chat.completions.create(model="demo", messages=HELLO, stream=True, **more):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [one.token for one in streamed] == [one.token for one in content]


def test_logprobs_of_a_prompt(client: openai.OpenAI) -> None:
    """How evaluations score texts: the prompt comes back with its logprobs, and nothing is generated."""
    text = "The capital of France is Paris."
    more: Any = {"echo": True, "logprobs": 2, "temperature": 0}
    whole = client.completions.create(model="demo", prompt=text, max_tokens=0, **more)
    choice = whole.choices[0]
    assert choice.text == text
    scores = choice.logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert "".join(scores.tokens) == text
    assert scores.text_offset == [len("".join(scores.tokens[:i])) for i in range(len(scores.tokens))]
    assert scores.token_logprobs is not None
    assert scores.token_logprobs[0] is None
    assert scores.token_logprobs[-2] > -3  # " Paris" is no surprise
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 0
    longer = client.completions.create(model="demo", prompt=text, max_tokens=2, **more).choices[0]
    assert longer.logprobs is not None
    assert longer.logprobs.tokens is not None
    assert "".join(longer.logprobs.tokens) == longer.text
    assert len(longer.logprobs.tokens) == len(scores.tokens) + 2


def test_responses_and_their_stream(client: openai.OpenAI) -> None:
    more: Any = {"model": "demo", "input": HELLO[0]["content"], "max_output_tokens": 30, "temperature": 0}
    more |= {"include": ["message.output_text.logprobs"]}
    whole = client.responses.create(**more, instructions="Be brief.")
    assert whole.status == "completed"
    assert "Paris" in whole.output_text
    assert whole.usage is not None
    with client.responses.stream(**more, instructions="Be brief.") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert [one.sequence_number for one in events] == list(range(len(events)))
    kinds = [one.type for one in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == f"response.{final.status}"
    assert (
        "".join(one.delta for one in events if one.type == "response.output_text.delta") == whole.output_text
    )
    assert final.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens
    (message,) = whole.output
    assert message.type == "message"
    assert message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs
    assert logprobs is not None
    assert "".join(one.token for one in logprobs).startswith(whole.output_text)
    streamed = [one.logprobs for one in events if one.type == "response.output_text.delta"]
    # The last one's token has no text: it ended the answer.
    assert [one.token for each in streamed for one in each] == [one.token for one in logprobs]


def test_functions_in_responses(client: openai.OpenAI) -> None:
    """Called, streamed, and answered to."""
    tool: Any = {"type": "function", **ADD["function"]}
    more: Any = {"model": "demo", "tools": [tool], "max_output_tokens": 60, "temperature": 0}
    ask: Any = {**more, "input": SUM, "tool_choice": "required", "parallel_tool_calls": False}
    whole = client.responses.create(**ask)
    (call,) = whole.output
    assert call.type == "function_call"
    assert (call.name, call.status, whole.status) == ("add", "completed", "completed")
    assert set(json.loads(call.arguments)) == {"a", "b"}

    with client.responses.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_response()
    (streamed,) = final.output
    assert streamed.type == "function_call"
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    deltas = [one.delta for one in events if one.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 1
    kinds = [one.type for one in events]
    assert kinds[2] == "response.output_item.added"
    assert kinds[-3:-1] == ["response.function_call_arguments.done", "response.output_item.done"]

    named = client.responses.create(**{**ask, "tool_choice": {"type": "function", "name": "add"}})
    assert named.output[0].type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "5"}
    talk = [*SUM, call.model_dump(exclude_none=True), result]
    after = client.responses.create(**{**more, "max_output_tokens": 4}, input=talk)
    assert after.output_text
    assert after.usage is not None
    assert whole.usage is not None
    assert after.usage.input_tokens > whole.usage.input_tokens + 10


def test_responses_that_are_refused_or_parsed(client: openai.OpenAI) -> None:
    more: Any = {"model": "demo", "max_output_tokens": 60, "temperature": 0}
    parsed = client.responses.parse(**more, input=HELLO, text_format=City)
    assert isinstance(parsed.output_parsed, City)
    options = {"include_usage": True}
    wrong: list[dict[str, Any]] = [
        {"previous_response_id": "resp_1"},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "function", "name": "f", "colour": "red"}]},
        {"tool_choice": {"type": "web_search"}},
        {"stream": True, "extra_body": {"stream_options": options}},
    ]
    for refused in wrong:
        with pytest.raises(openai.BadRequestError) as bad:
            client.responses.create(**more, input="Hello", **refused)
        assert bad.value.param in (*refused, *refused.get("extra_body", ()))


def test_hanging_up_stops_the_engine(demo: Any) -> None:
    """Within two steps, and those that were under way; here with room for a machine that is busy."""

    def engine() -> Any:
        return httpx.get(f"{demo.url}/stats", timeout=60).json()["engine"]

    before = engine()["generation_tokens"]
    body = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{demo.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
    while (now := engine())["num_running"]:
        pass
    assert now["generation_tokens"] - before < 300
    assert now["num_free_blocks"] == now["num_blocks"]
