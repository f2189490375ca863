"""From a conversation to the model's prompt: messages brought to the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..chat_messages import check_variables, plain_messages
from .protocol import Message, Tool
from .service import Service

_TOOL_PROMPT = """You may call functions. Their signatures are within <tools></tools>:
<tools>
{signatures}
</tools>
To call one, answer with a JSON object within <tool_call></tool_call>:
<tool_call>
{{"name": <function name>, "arguments": <object with its arguments>}}
</tool_call>"""
"""For models whose chat template does not show tools. The form is Hermes's, which most have seen."""


def render(
    service: Service,
    template: str | None,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    add_generation_prompt: bool | None,
    continue_final_message: bool | None,
    variables: dict[str, Any],
) -> str:
    """The prompt's text. Raises ApiError, RequestError."""
    check_variables(variables)
    plain = plain_messages(messages)
    shown = [msgspec.to_builtins(tool) for tool in tools]
    if shown and "tools" not in (template or ""):
        plain, shown = _with_tool_prompt(plain, shown), []
    text = service.tokenizer.apply_chat_template(
        plain,
        tokenize=False,
        chat_template=template,
        # Asked for neither, a template that is to go on with a message cannot begin one.
        add_generation_prompt=not continue_final_message
        if add_generation_prompt is None
        else add_generation_prompt,
        continue_final_message=bool(continue_final_message),
        tools=shown or None,
        **variables,
    )
    assert isinstance(text, str)
    return text


def _with_tool_prompt(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    signatures = "\n".join(msgspec.json.encode(tool).decode() for tool in tools)
    text = _TOOL_PROMPT.format(signatures=signatures)
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
