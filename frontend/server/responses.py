"""POST /v1/responses: OpenAI's newer form of a conversation. Text and functions; nothing is stored."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ..chat_messages import content_text
from .conversation import render
from .endpoints import Endpoint
from .errors import bad_request
from .generation import Run, encode, truncated
from .protocol import Function, FunctionName, FunctionTool, Message, NamedTool, ResponsesRequest, Tool
from .response_items import ItemizedAnswer
from .service import Service
from .streaming import EventStream, unless_gone
from .tool_use import ToolUse, structure_of, tool_use


async def respond(service: Service, request: Request, body: ResponsesRequest) -> Response:
    service.check_model(body.model)
    body.refuse_unsupported()
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning is not None and body.reasoning.effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning.effort)
    use = _tool_use(body)
    text = render(service, service.chat_template, _messages(body), use.tools, None, None, variables)
    params = body.sampling(
        service.chat_defaults(),
        max_tokens=body.max_output_tokens,
        structured_outputs=structure_of(body, use, service.parsers.form),
        logprobs=body.logprobs_wanted,
    )
    ids = truncated(service, body, params, await encode(service, text, bool(body.add_special_tokens)))
    run = Run(service, request, "resp", body, [{"prompt": text, "prompt_token_ids": ids}], params)
    is_constrained = use.must_call or body.structure() is not None
    answer = ItemizedAnswer(service, body, run, params, service.parsers.answer(text, use, is_constrained))
    if body.stream:
        return EventStream(answer.events(), run.id, on_error=answer.error, end=b"")
    return await unless_gone(request, answer.whole())


def _tool_use(body: ResponsesRequest) -> ToolUse:
    """This route writes functions and choices flat. Raises ApiError."""
    tools = [_tool(given, f"tools[{i}]") for i, given in enumerate(body.tools or ())]
    given = body.tool_choice
    if not isinstance(given, dict):
        return tool_use(tools, given, body.parallel_tool_calls)
    if given.get("type") != "function" or not isinstance(given.get("name"), str):
        raise bad_request(f"tool_choice={given!r:.100} is not supported", "tool_choice")
    choice = NamedTool(type="function", function=FunctionName(name=given["name"]))
    return tool_use(tools, choice, body.parallel_tool_calls)


def _tool(given: dict[str, Any], where: str) -> Tool:
    if given.get("type") != "function":
        message = f"{where}: tools of type {given.get('type')!r:.100} are not supported, only functions are"
        raise bad_request(message, "tools")
    try:
        found = msgspec.convert(given, FunctionTool)
    except msgspec.ValidationError as error:
        raise bad_request(f"{where}: {error}", "tools") from None
    about = Function(
        name=found.name, description=found.description, parameters=found.parameters, strict=found.strict
    )
    return Tool(type="function", function=about)


def _messages(body: ResponsesRequest) -> list[Message]:
    """The input as a conversation. Raises ApiError for items that are not part of one."""
    messages: list[Message] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        match item.get("type", "message"):
            case "reasoning":
                pass  # of earlier answers: models are not shown it again
            case "message":
                messages.append({"role": item.get("role"), "content": item.get("content")})
            case "function_call":
                call = {"name": item.get("name"), "arguments": item.get("arguments")}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                calls = messages[-1].setdefault("tool_calls", [])
                calls.append({"id": item.get("call_id"), "type": "function", "function": call})
            case "function_call_output":
                text = content_text(item.get("output"), f"input[{i}].output")
                messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": text})
            case kind:
                raise bad_request(f"input[{i}]: items of type {kind!r:.100} are not supported", "input")
    return messages


ENDPOINTS = [Endpoint("POST", "/v1/responses", respond, "Answer, in the newer form", ResponsesRequest)]
