"""From a conversation to the model's prompt: messages brought to the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from .errors import bad_request
from .protocol import Message, Tool
from .service import Service

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_RESERVED = frozenset({"messages", "tools", "tokenize", "chat_template", "bos_token", "eos_token"})
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
    if clash := _RESERVED & variables.keys():
        raise bad_request(f"chat_template_kwargs cannot set {min(clash)!r}", "chat_template_kwargs")
    plain = [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]
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


def _plain(message: Message, where: str) -> Message:
    """Content as a string, arguments of calls as objects, "developer" as "system". Raises ApiError."""
    role = message.get("role")
    if not isinstance(role, str):
        raise bad_request(f"{where}.role must be a string, got {role!r:.100}", "messages")
    plain = {**message, "role": "system" if role == "developer" else role}
    plain["content"] = content_text(message.get("content"), where)
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = _calls(calls, where)
    else:
        plain.pop("tool_calls", None)
    return plain


def content_text(content: object, where: str) -> str:
    """The text of a message's content: a string, nothing, or parts of which all are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    parts: list[Any] = content if isinstance(content, list) else [content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            shown = kind if isinstance(kind, str) else part
            raise bad_request(
                f"{where}.content: {shown!r:.100} is not text, all that there is here", "messages"
            )
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise bad_request(f"{where}.content: a part of type {kind!r} has no text", "messages")
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Templates print arguments as JSON themselves, so they are to be objects, not their text."""
    plain: list[dict[str, Any]] = []
    several: list[Any] = calls if isinstance(calls, list) else [calls]
    for call in several:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_request(f"{where}.tool_calls must be a list of function calls", "messages")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            with suppress(msgspec.DecodeError, RecursionError):  # not JSON: the model may see what it wrote
                arguments = msgspec.json.decode(arguments)
        plain.append({**call, "function": {**function, "arguments": arguments}})
    return plain


def _with_tool_prompt(messages: list[Message], tools: list[dict[str, Any]]) -> list[Message]:
    signatures = "\n".join(msgspec.json.encode(tool).decode() for tool in tools)
    text = _TOOL_PROMPT.format(signatures=signatures)
    if messages and messages[0]["role"] == "system":
        first = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]
