"""Reasoning and tool calls, taken from text: the same however the text is cut into pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from headrace.frontend.server.parsers import AnswerParser, Parsers
from headrace.frontend.server.protocol import Function, Tool
from headrace.frontend.server.tool_use import ToolUse
from hypothesis import given
from hypothesis import strategies as st

TOOLS = ["weather", "add"]
CALL = '{"name": "weather", "arguments": {"city": "Z\\"ü}{rich", "days": [1, 2]}}'
ARGUMENTS = '{"city": "Z\\"ü}{rich", "days": [1, 2]}'
LLAMA = CALL.replace("arguments", "parameters")
ADD = '{"arguments": {"a": 1}, "name": "add"}'

Answer = tuple[str, str, list[tuple[str, str]]]
"""(reasoning, content, [(name, arguments)])"""


def parse(parser: AnswerParser, pieces: list[str]) -> Answer:
    reasoning = content = ""
    calls: dict[int, list[Any]] = {}
    ids: set[str] = set()
    for number, piece in enumerate(pieces):
        found = parser.push(piece, number == len(pieces) - 1)
        reasoning += found.reasoning
        content += found.content
        for call in found.calls:
            if call.name is not None:
                assert call.number == len(calls)  # named once, in order
                assert call.id is not None
                ids.add(call.id)
                calls[call.number] = [call.name, ""]
            calls[call.number][1] += call.arguments
    assert len(ids) == len(calls)
    assert parser.has_calls == bool(calls)
    return reasoning, content, [(name, arguments) for name, arguments in calls.values()]


def use(limit: int | None = None) -> ToolUse:
    return ToolUse([Tool(type="function", function=Function(name=name)) for name in TOOLS], False, limit)


def hermes(prompt: str = "", limit: int | None = None) -> AnswerParser:
    return Parsers("hermes", "think", None).answer(prompt, use(limit), False)


def llama() -> AnswerParser:
    return Parsers("llama3_json", "none", None).answer("", use(), False)


def plain() -> AnswerParser:
    return Parsers("hermes", "none", None).answer("", ToolUse([], False, None), False)


W = ("weather", ARGUMENTS)
CASES: list[tuple[Any, str, Answer]] = [
    (hermes, "Hello <b>you</b>\n", ("", "Hello <b>you</b>\n", [])),
    (hermes, "<think>\nSo 1 < 2.\n</think>\n\nYes <tool", ("So 1 < 2.\n", "Yes <tool", [])),
    (hermes, "<think>for ever", ("for ever", "", [])),
    (hermes, " <thin air>", ("", " <thin air>", [])),
    (lambda: hermes("...<think>\n"), "Hm.</think>Yes", ("Hm.", "Yes", [])),
    (hermes, f"<tool_call>\n{CALL}\n</tool_call>", ("", "", [W])),
    (hermes, f"I look.\n\n<tool_call>{CALL}</tool_call>\n", ("", "I look.", [W])),
    (
        hermes,
        f"<think>x</think>\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{ADD}\n</tool_call>",
        ("x", "", [W, ("add", '{"a":1}')]),
    ),
    (lambda: hermes("", 1), f"<tool_call>{CALL}</tool_call><tool_call>{ADD}</tool_call>", ("", "", [W])),
    (hermes, f"<tool_call>{CALL}", ("", "", [W])),
    (hermes, '<tool_call>{"name": "add", "arguments": {"a": 1', ("", "", [("add", '{"a": 1')])),
    (hermes, '<tool_call>{"name": "ad', ("", '<tool_call>{"name": "ad', [])),
    (hermes, "a<tool_call>what?</tool_call>", ("", "a<tool_call>what?</tool_call>", [])),
    (
        hermes,
        '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        ("", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>', []),
    ),
    (hermes, '<tool_call>{"name":"add","arguments":"{}"}</tool_call>.', ("", ".", [("add", "{}")])),
    (llama, LLAMA, ("", "", [W])),
    (llama, f"<|python_tag|>{LLAMA}; {LLAMA}", ("", "", [W, W])),
    (llama, 'The set {"a": 1}', ("", 'The set {"a": 1}', [])),
    (llama, ' {"a": 1}, you see', ("", ' {"a": 1}, you see', [])),
    (llama, '{"name": "rm", "parameters": {}}', ("", '{"name": "rm", "parameters": {}}', [])),
    (llama, '{"name": "ad', ("", '{"name": "ad', [])),
    (llama, "<|py", ("", "<|py", [])),
    (llama, f"[{LLAMA}, {LLAMA}]", ("", "", [W, W])),
    (plain, "<think></think><tool_call>{}", ("", "<think></think><tool_call>{}", [])),
]


@pytest.mark.parametrize(("make", "text", "answer"), CASES)
def test_whole_and_letter_by_letter(make: Any, text: str, answer: Answer) -> None:
    assert parse(make(), [text]) == answer
    assert parse(make(), list(text)) == answer
    assert parse(make(), [*text, ""]) == answer


@given(st.data())
def test_however_it_is_cut(data: st.DataObject) -> None:
    make, text, answer = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(text) - 1))))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(make(), pieces) == answer


@given(st.text(alphabet='<tool_call>/{}[]"\\:, nameargumentsadd'), st.sampled_from([hermes, llama]))
def test_nothing_gets_lost(text: str, make: Any) -> None:
    """What is not a call, nor blanks around one, comes out as content."""
    _, content, calls = parse(make(), list(text) or [""])
    assert calls or content.strip() == text.strip()


def test_arguments_come_as_they_are_written() -> None:
    parser = hermes()
    parser.push('<tool_call>{"name": "add", "arguments": {"a": ', False)
    (news,) = parser.push("12", False).calls
    assert news.arguments == "12"


@pytest.mark.parametrize(
    ("template", "calls", "thinks"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes", False),
        ("{% if tools %}{{ tools }}{% endif %}", "llama3_json", False),
        ("{{ messages }}", "hermes", False),
        ("{{ '<think>' }}", "hermes", True),
    ],
)
def test_the_form_is_told_by_the_template(template: str, calls: str, thinks: bool) -> None:
    found = Parsers("auto", "auto", template)
    assert (found.calls, found.thinks) == (calls, thinks)
    assert not Parsers("none", "none", template).thinks


def test_arguments_are_json() -> None:
    (_, _, calls) = parse(hermes(), [f"<tool_call>{CALL}</tool_call>"])
    assert json.loads(calls[0][1]) == {"city": 'Z"ü}{rich', "days": [1, 2]}
