"""Messages of a conversation, as chat APIs take them, brought to the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from ..ipc.errors import RequestError

_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_REASONING = (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning"))
_RESERVED = frozenset(
    {
        "messages",
        "tools",
        "tokenize",
        "chat_template",
        "bos_token",
        "eos_token",
        "add_generation_prompt",
        "continue_final_message",
    }
)


def check_variables(variables: object) -> dict[str, Any]:
    """`chat_template_kwargs`: names of the template's own. Raises RequestError."""
    name = "chat_template_kwargs"
    if not isinstance(variables, Mapping):
        raise RequestError(f"{name} must be a dict, got {variables!r:.100}", parameter=name, limit="a dict")
    if clash := _RESERVED & variables.keys():
        raise RequestError(f"{name} cannot set {min(clash)!r}", parameter=name, value=min(clash))
    return dict(variables)


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Content as a string, arguments of calls as objects, "developer" as "system". Raises RequestError."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise _refusal(f"messages must be a non-empty list, got {messages!r:.100}")
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _refusal(f'{where} must be {{"role": ..., "content": ...}}, got {message!r:.100}')
    role = message.get("role")
    if not isinstance(role, str):
        raise _refusal(f"{where}.role must be a string, got {role!r:.100}")
    plain = {**message, "role": "system" if role == "developer" else role}
    plain["content"] = content_text(message.get("content"), where)
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = _calls(calls, where)
    else:
        plain.pop("tool_calls", None)
    # Of earlier answers: clients have one name for it, templates another.
    for name, other in _REASONING:
        if message.get(name) is not None:
            plain.setdefault(other, message[name])
    return plain


def content_text(content: object, where: str) -> str:
    """The text of a message's content: a string, nothing, or parts of which all are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    parts: Sequence[Any] = content if isinstance(content, (list, tuple)) else [content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            shown = kind if isinstance(kind, str) else part
            raise _refusal(f"{where}.content: {shown!r:.100} is not text, all that there is here")
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise _refusal(f"{where}.content: a part of type {kind!r} has no text")
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Templates print arguments as JSON themselves, so they are to be objects, not their text."""
    plain: list[dict[str, Any]] = []
    several: list[Any] = calls if isinstance(calls, list) else [calls]
    for call in several:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _refusal(f"{where}.tool_calls must be a list of function calls")
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            with suppress(msgspec.DecodeError, RecursionError):  # not JSON: the model may see what it wrote
                arguments = msgspec.json.decode(arguments)
        plain.append({**call, "function": {**function, "arguments": arguments}})
    return plain


def _refusal(message: str) -> RequestError:
    return RequestError(message, parameter="messages")
