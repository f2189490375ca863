"""Messages of a conversation in their plain form, or refused by their place."""

from __future__ import annotations

from typing import Any

import pytest
from headrace import RequestError
from headrace.frontend.chat_messages import check_variables, plain_messages


def test_plain_forms() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": "x"},
        {"role": "tool", "content": "3", "tool_calls": []},
    ]
    given = [message.copy() for message in messages]
    assert plain_messages(messages) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": [1]}}}],
            "name": "x",
        },
        {"role": "tool", "content": "3"},
    ]
    assert messages == given


def test_reasoning_has_two_names() -> None:
    said = {"role": "assistant", "content": "8"}
    both = {**said, "reasoning": "7 + 1", "reasoning_content": "7 + 1"}
    assert (
        plain_messages([{**said, "reasoning": "7 + 1"}, {**said, "reasoning_content": "7 + 1"}]) == [both] * 2
    )
    assert plain_messages([{**said, "reasoning": None}]) == [{**said, "reasoning": None}]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        None,
        ["hi"],
        [{}],
        [{"role": 1, "content": "a"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "assistant", "tool_calls": [{"function": "f"}]}],
        [{"role": "assistant", "tool_calls": 3}],
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        plain_messages(messages)
    assert caught.value.parameter == "messages"


@pytest.mark.parametrize("variables", [{"tokenize": True}, {"messages": []}, {"add_generation_prompt": 1}, 7])
def test_variables_are_the_templates_own(variables: Any) -> None:
    assert check_variables({"enable_thinking": False}) == {"enable_thinking": False}
    with pytest.raises(RequestError, match="chat_template_kwargs"):
        check_variables(variables)
