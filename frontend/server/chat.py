"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..chat_messages import content_text
from ..outputs import CompletionOutput, RequestOutput
from .beams import refuse_unsearchable
from .conversation import render
from .endpoints import Endpoint
from .errors import bad_request
from .generation import Run, encode, logprob_forms, truncated
from .parsers import AnswerParser, Delta
from .protocol import ChatRequest
from .service import Service
from .streaming import EventStream, event, json_response, unless_gone
from .tool_calls import CallDelta
from .tool_use import structure_of, tool_use


async def chat(service: Service, request: Request, body: ChatRequest) -> Response:
    service.check_model(body.model)
    body.refuse_unsupported()
    use = tool_use(body.tools or [], body.tool_choice, body.parallel_tool_calls)
    template = service.template(body.chat_template)
    text = render(
        service,
        template,
        body.messages,
        use.tools,
        body.add_generation_prompt,
        body.continue_final_message,
        _template_variables(body),
    )
    makers = service.parsers_for(template)
    params = body.sampling(
        service.chat_defaults(),
        max_tokens=body.max_completion_tokens,
        structured_outputs=structure_of(body, use, makers.form),
        logprobs=_top_logprobs(body),
    )
    refuse_unsearchable(body, params, service.engine)
    ids = truncated(service, body, params, await encode(service, text, bool(body.add_special_tokens)))
    run = Run(service, request, "chatcmpl", body, [{"prompt": text, "prompt_token_ids": ids}], params)
    is_constrained = use.must_call or body.structure() is not None
    parsers = [makers.answer(text, use, is_constrained) for _ in range(params.n)]
    answer = _Answer(service, body, run, parsers)
    if body.stream:
        return EventStream(answer.events(), run.id)
    return await unless_gone(request, answer.whole())


def _top_logprobs(body: ChatRequest) -> int | None:
    """How many of the likeliest tokens are wanted at each position; None: no logprobs at all."""
    if not body.logprobs:
        if body.top_logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        return None
    return None if body.logprob_token_ids is not None else body.top_logprobs or 0


class _Answer:
    """A run's outputs in the form of this route."""

    def __init__(self, service: Service, body: ChatRequest, run: Run, parsers: list[AnswerParser]) -> None:
        self._body = body
        self._run = run
        self._parsers = parsers
        self._echo = _echo(body)
        self._logprobs = logprob_forms(service, body, (body.top_logprobs or 0) if body.logprobs else None)
        self._head = {
            "id": run.id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": service.model,
        }

    async def whole(self) -> Response:
        choices: list[dict[str, Any]] = []
        about_prompt: dict[str, Any] = {}
        async for _, output in self._run.outputs():
            choices = [self._choice("message", part, _message) for part in output.outputs]
            about_prompt = self._about_prompt(output)
        for choice in choices if self._echo else ():
            choice["message"]["content"] = self._echo + (choice["message"]["content"] or "")
        answer = {**self._head, "choices": choices, "usage": self._run.usage.body(), **about_prompt}
        answer |= self._run.timings()
        return json_response(answer, self._run.id)

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        shows_usage = options is not None and bool(options.continuous_usage_stats)
        begun: set[int] = set()
        async for _, output in self._run.outputs():
            for part in output.outputs:
                if part.index not in begun:
                    begun.add(part.index)
                    opening = _opening(part.index, self._echo)
                    yield self._event([opening], shows_usage, self._about_prompt(output))
                choice = self._choice("delta", part, _delta)
                news = (choice["delta"], choice["logprobs"], choice["finish_reason"], choice.get("token_ids"))
                if any(news):  # otherwise its text is held back until more is known
                    yield self._event([choice], shows_usage)
        if options is not None and options.include_usage:
            yield self._event([], True, self._run.timings())

    def _about_prompt(self, output: RequestOutput) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self._body.return_token_ids:
            about["prompt_token_ids"] = output.prompt_token_ids
        if self._body.return_prompt_text:
            about["prompt_text"] = output.prompt
        if self._logprobs is not None and output.prompt_logprobs is not None:
            about["prompt_logprobs"] = self._logprobs.prompt(output.prompt_logprobs)
        return about

    def _event(
        self, choices: list[dict[str, Any]], shows_usage: bool, more: dict[str, Any] | None = None
    ) -> bytes:
        chunk = {**self._head, "choices": choices, **(more or {})}
        if shows_usage:
            chunk["usage"] = self._run.usage.body()
        return event(chunk)

    def _choice(self, name: str, part: CompletionOutput, show: Any) -> dict[str, Any]:
        parser = self._parsers[part.index]
        found = parser.push(part.text, part.finish_reason is not None)
        if self._body.include_reasoning is False:
            found = found._replace(reasoning="")
        reason = part.finish_reason
        choice: dict[str, Any] = {
            "index": part.index,
            name: show(found),
            "logprobs": None,
            "finish_reason": "tool_calls" if reason == "stop" and parser.has_calls else reason,
            "stop_reason": part.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = part.token_ids
        if self._body.logprobs and self._logprobs is not None and part.logprobs:
            choice["logprobs"] = self._logprobs.chat(part.logprobs)
        return choice


def _echo(body: ChatRequest) -> str:
    """What the answer begins with: the assistant's last message, if that was wished and there is one."""
    last = len(body.messages) - 1
    if not body.echo or last < 0 or body.messages[last].get("role") != "assistant":
        return ""
    return content_text(body.messages[last].get("content"), f"messages[{last}]")


def _opening(index: int, text: str) -> dict[str, Any]:
    delta = {"role": "assistant", "content": text}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _delta(found: Delta) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    if found.reasoning:
        delta |= _reasoning(found.reasoning)
    if found.content:
        delta["content"] = found.content
    if found.calls:
        delta["tool_calls"] = [_call_delta(call) for call in found.calls]
    return delta


def _reasoning(text: str) -> dict[str, str]:
    """By vLLM's name for it, and by the older one that most other servers and clients have."""
    return {"reasoning": text, "reasoning_content": text}


def _call_delta(call: CallDelta) -> dict[str, Any]:
    function = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.number, "function": function}
    return {
        "index": call.number,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, **function},
    }


def _message(found: Delta) -> dict[str, Any]:
    """An answer that has arrived as one piece: deltas of one call follow each other."""
    message: dict[str, Any] = {"role": "assistant", "content": found.content}
    if found.reasoning:
        message |= _reasoning(found.reasoning)
    calls: list[dict[str, Any]] = []
    for call in found.calls:
        if call.name is None:
            calls[-1]["function"]["arguments"] += call.arguments
        else:
            function = {"name": call.name, "arguments": call.arguments}
            calls.append({"id": call.id, "type": "function", "function": function})
    if calls:
        message["tool_calls"] = calls
        message["content"] = found.content or None
    return message


def _template_variables(body: ChatRequest) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    for name in ("documents", "reasoning_effort"):
        if (value := getattr(body, name)) is not None:
            variables.setdefault(name, value)
    return variables


ENDPOINTS = [Endpoint("POST", "/v1/chat/completions", chat, "Continue a conversation", ChatRequest)]
