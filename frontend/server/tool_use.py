"""What `tools` and `tool_choice` mean: which functions an answer may call, whether it must, in which form.

A model that has to call, or whose functions are strict, is held to the form by structured output: to the same
text that it would write by itself, so that one parser reads both.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from ..structured_outputs import StructuredOutputsParams
from .errors import bad_request
from .protocol import WHITESPACE, Function, Generation, NamedTool, Tool


class Form(NamedTuple):
    """How a model writes a call, with %s for the function's name in JSON."""

    trigger: str
    """No call begins in another way."""
    begin: str
    end: str
    separator: str


HERMES = Form("<tool_call>", '<tool_call>\n{"name": %s, "arguments": ', "}\n</tool_call>", "\n")
LLAMA = Form('{"name": ', '{"name": %s, "parameters": ', "}", "; ")


class ToolUse(NamedTuple):
    """What an answer may do with functions."""

    tools: list[Tool]
    """On offer; none when there are to be no calls."""
    must_call: bool
    limit: int | None
    """Most calls in one answer."""

    @property
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.tools]

    def constraint(self, form: Form) -> StructuredOutputsParams | None:
        """What the text must be so that calls are valid; None when nothing was promised."""
        if not self.must_call and not any(tool.function.strict for tool in self.tools):
            return None
        tags = [
            _tag(tool.function, form, self.must_call or bool(tool.function.strict)) for tool in self.tools
        ]
        wanted: dict[str, Any] = {"tags": tags, "stop_after_first": self.limit == 1}
        if self.must_call:
            wanted |= {"type": "tags_with_separator", "separator": form.separator, "at_least_one": True}
        else:
            wanted |= {"type": "triggered_tags", "triggers": [form.trigger]}
        tag = {"type": "structural_tag", "format": wanted}
        return StructuredOutputsParams(structural_tag=tag, whitespace_pattern=WHITESPACE)


def tool_use(
    tools: list[Tool],
    choice: Literal["none", "auto", "required"] | NamedTool | None,
    parallel_tool_calls: bool | None,
) -> ToolUse:
    """Raises ApiError."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) != len(names):
        raise bad_request("tools must have different names", "tools")
    if choice == "none":
        return ToolUse([], False, None)
    if not tools and choice is not None:
        raise bad_request("tool_choice needs tools", "tool_choice")
    limit = 1 if parallel_tool_calls is False else None
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise bad_request(f"tool_choice names {name!r:.100}, which is not one of tools", "tool_choice")
        return ToolUse([tools[names.index(name)]], True, 1)
    return ToolUse(tools, choice == "required", limit)


def structure_of(body: Generation, use: ToolUse, form: Form) -> StructuredOutputsParams | None:
    """Raises ApiError: an answer cannot have two forms."""
    wanted, calls = body.structure(), use.constraint(form)
    if wanted is not None and calls is not None:
        message = "structured output and calls that must be valid exclude each other"
        raise bad_request(message, "tool_choice" if use.must_call else "tools")
    return wanted or calls


def _tag(function: Function, form: Form, is_held: bool) -> dict[str, Any]:
    schema = function.parameters or {"type": "object", "properties": {}}
    name = msgspec.json.encode(function.name).decode()
    content = {"type": "json_schema", "json_schema": schema if is_held else {"type": "object"}}
    return {"type": "tag", "begin": form.begin % name, "content": content, "end": form.end}
