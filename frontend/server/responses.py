"""POST /v1/responses: OpenAI's newer form of a conversation. Text in, text out; nothing is stored."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..outputs import CompletionOutput
from ..sampling_params import SamplingParams
from .conversation import render
from .endpoints import Endpoint
from .errors import ApiError, bad_request
from .generation import Run, encode, logprob_forms, truncated
from .parsers import AnswerParser
from .protocol import Message, ResponsesRequest
from .service import Service
from .streaming import EventStream, event, json_response, unless_gone
from .tool_use import ToolUse

_NO_TOOLS = ToolUse([], False, None)


async def respond(service: Service, request: Request, body: ResponsesRequest) -> Response:
    service.check_model(body.model)
    body.refuse_unsupported()
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning is not None and body.reasoning.effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning.effort)
    text = render(service, service.chat_template, _messages(body), [], None, None, variables)
    structure = body.structure()
    params = body.sampling(
        service.chat_defaults(),
        max_tokens=body.max_output_tokens,
        structured_outputs=structure,
        logprobs=_top_logprobs(body),
    )
    ids = truncated(service, body, params, await encode(service, text, bool(body.add_special_tokens)))
    run = Run(service, request, "resp", body, [{"prompt": text, "prompt_token_ids": ids}], params)
    answer = _Answer(
        service, body, run, params, service.parsers.answer(text, _NO_TOOLS, structure is not None)
    )
    if body.stream:
        return EventStream(answer.events(), run.id, on_error=answer.error, end=b"")
    return await unless_gone(request, answer.whole())


class _Answer:
    """A run's outputs as items: reasoning, if there is any, then a message.

    `_advance` turns an output into events; the whole answer is what they have built up.
    """

    def __init__(
        self,
        service: Service,
        body: ResponsesRequest,
        run: Run,
        params: SamplingParams,
        parser: AnswerParser,
    ) -> None:
        self._body = body
        self._run = run
        self._parser = parser
        self._logprobs = logprob_forms(service, body, _top_logprobs(body))
        self._items: list[dict[str, Any]] = []
        self._num_events = 0
        self._response: dict[str, Any] = {
            "id": run.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": service.model,
            "output": self._items,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    async def whole(self) -> Response:
        async for _, output in self._run.outputs():
            for _event in self._advance(output.outputs[0]):
                pass
        return json_response(self._response, self._run.id)

    async def events(self) -> AsyncGenerator[bytes, None]:
        begun = False
        async for _, output in self._run.outputs():
            if not begun:  # an error before the first output has a status code of its own
                begun = True
                yield self._event("response.created", response=self._response)
                yield self._event("response.in_progress", response=self._response)
            for one in self._advance(output.outputs[0]):
                yield one

    def error(self, error: ApiError) -> bytes:
        told = error.body()["error"]
        return self._event("error", code=told["type"], message=told["message"], param=told["param"])

    def _advance(self, part: CompletionOutput) -> Iterator[bytes]:
        """Take in an output: the events that it is worth."""
        found = self._parser.push(part.text, part.finish_reason is not None)
        if found.reasoning:
            yield from self._add("reasoning", found.reasoning, [])
        logprobs: list[Any] = []
        if self._logprobs is not None and part.logprobs:
            logprobs = self._logprobs.chat(part.logprobs)["content"]
        if found.content or (part.finish_reason is not None and not self._has("message")):
            yield from self._add("message", found.content, logprobs)
        if part.finish_reason is not None:
            yield from self._finish(part.finish_reason)

    def _has(self, kind: str) -> bool:
        return bool(self._items) and self._items[-1]["type"] == kind

    def _add(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[bytes]:
        """More text of an item, which may be a new one."""
        if not self._has(kind):
            yield from self._close("completed")
            yield from self._open(kind)
        part = self._items[-1]["content"][0]
        part["text"] += text
        where = self._where()
        if kind == "reasoning":
            yield self._event("response.reasoning_text.delta", delta=text, **where)
        else:
            part["logprobs"] += logprobs
            yield self._event("response.output_text.delta", delta=text, logprobs=logprobs, **where)

    def _open(self, kind: str) -> Iterator[bytes]:
        item: dict[str, Any] = {
            "id": f"{kind[:3]}_{secrets.token_hex(12)}",
            "type": kind,
            "status": "in_progress",
        }
        part: dict[str, Any]
        if kind == "reasoning":
            item["summary"] = []
            part = {"type": "reasoning_text", "text": ""}
        else:
            item["role"] = "assistant"
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items.append({**item, "content": []})
        yield self._event(
            "response.output_item.added", item=self._items[-1], output_index=len(self._items) - 1
        )
        self._items[-1]["content"].append(part)
        yield self._event("response.content_part.added", part=part, **self._where())

    def _close(self, status: str) -> Iterator[bytes]:
        if not self._items:
            return
        item = self._items[-1]
        item["status"] = status
        part = item["content"][0]
        where = self._where()
        if item["type"] == "reasoning":
            yield self._event("response.reasoning_text.done", text=part["text"], **where)
        else:
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **done, **where)
        yield self._event("response.content_part.done", part=part, **where)
        yield self._event("response.output_item.done", item=item, output_index=where["output_index"])

    def _finish(self, reason: str) -> Iterator[bytes]:
        status = "completed" if reason == "stop" else "incomplete"
        yield from self._close(status)
        usage = self._run.usage
        self._response["status"] = status
        if status == "incomplete":
            self._response["incomplete_details"] = {
                "reason": "max_output_tokens" if reason == "length" else reason
            }
        self._response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        yield self._event(f"response.{status}", response=self._response)

    def _where(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)


def _messages(body: ResponsesRequest) -> list[Message]:
    """The input as a conversation. Raises ApiError for items that are no messages."""
    messages: list[Message] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for i, item in enumerate(body.input):
        kind = item.get("type", "message")
        if kind == "reasoning":
            continue  # of earlier answers: models are not shown it again
        if kind != "message":
            raise bad_request(f"input[{i}]: items of type {kind!r:.100} are not supported", "input")
        messages.append({"role": item.get("role"), "content": item.get("content")})
    return messages


def _top_logprobs(body: ResponsesRequest) -> int | None:
    wanted = "message.output_text.logprobs" in (body.include or ()) or body.top_logprobs
    return body.top_logprobs or 0 if wanted else None


ENDPOINTS = [Endpoint("POST", "/v1/responses", respond, "Answer, in the newer form", ResponsesRequest)]
