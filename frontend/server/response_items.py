"""An answer of /v1/responses: items that grow, and an event for each thing that happens to one."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from starlette.responses import Response

from ..outputs import CompletionOutput
from ..sampling_params import SamplingParams
from .errors import ApiError
from .generation import Run, logprob_forms
from .parsers import AnswerParser
from .protocol import ResponsesRequest
from .service import Service
from .streaming import event, json_response
from .tool_calls import CallDelta

_PREFIXES = {"message": "msg", "reasoning": "rs"}
"""Of items' ids, as OpenAI's are."""


class ItemizedAnswer:
    """A run's outputs as items: reasoning, if there is any, then a message, calls of functions, or both.

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
        self._logprobs = logprob_forms(service, body, body.logprobs_wanted)
        self._held: list[Any] = []
        """Logprobs of tokens that have shown no text yet."""
        self._items: list[dict[str, Any]] = []
        self._last_is_open = False
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
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
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
        if self._logprobs is not None and part.logprobs:
            self._held += self._logprobs.chat(part.logprobs)["content"]
        is_empty = not found.calls and not any(item["type"] != "reasoning" for item in self._items)
        goes_on = bool(self._held) and self._last_is_open and self._items[-1]["type"] == "message"
        if found.content or (part.finish_reason is not None and (is_empty or goes_on)):
            logprobs, self._held = self._held, []
            yield from self._add("message", found.content, logprobs)
        for call in found.calls:
            yield from self._call(call)
        if part.finish_reason is not None:
            yield from self._finish(part.finish_reason)

    def _add(self, kind: str, text: str, logprobs: list[Any]) -> Iterator[bytes]:
        """More text of an item, which may be a new one."""
        if not self._last_is_open or self._items[-1]["type"] != kind:
            yield from self._open_text(kind)
        part = self._items[-1]["content"][0]
        part["text"] += text
        where = self._where(content_index=0)
        if kind == "reasoning":
            yield self._event("response.reasoning_text.delta", delta=text, **where)
        else:
            part["logprobs"] += logprobs
            yield self._event("response.output_text.delta", delta=text, logprobs=logprobs, **where)

    def _call(self, call: CallDelta) -> Iterator[bytes]:
        """News of a call: a new item, or more of its arguments."""
        if call.name is not None:
            about = {"call_id": call.id, "name": call.name, "arguments": ""}
            yield from self._open("fc", {"type": "function_call", **about})
        if call.arguments:
            self._items[-1]["arguments"] += call.arguments
            yield self._event("response.function_call_arguments.delta", delta=call.arguments, **self._where())

    def _open_text(self, kind: str) -> Iterator[bytes]:
        item: dict[str, Any] = {"type": kind, "content": []}
        part: dict[str, Any]
        if kind == "reasoning":
            item["summary"] = []
            part = {"type": "reasoning_text", "text": ""}
        else:
            item["role"] = "assistant"
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield from self._open(_PREFIXES[kind], item)
        item["content"].append(part)
        yield self._event("response.content_part.added", part=part, **self._where(content_index=0))

    def _open(self, prefix: str, item: dict[str, Any]) -> Iterator[bytes]:
        yield from self._close("completed")
        item |= {"id": f"{prefix}_{secrets.token_hex(12)}", "status": "in_progress"}
        self._items.append(item)
        self._last_is_open = True
        yield self._event("response.output_item.added", item=item, output_index=len(self._items) - 1)

    def _close(self, status: str) -> Iterator[bytes]:
        if not self._last_is_open:
            return
        self._last_is_open = False
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **done, **self._where())
        else:
            yield from self._close_text(item)
        yield self._event("response.output_item.done", item=item, output_index=len(self._items) - 1)

    def _close_text(self, item: dict[str, Any]) -> Iterator[bytes]:
        part, where = item["content"][0], self._where(content_index=0)
        if item["type"] == "reasoning":
            yield self._event("response.reasoning_text.done", text=part["text"], **where)
        else:
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **done, **where)
        yield self._event("response.content_part.done", part=part, **where)

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

    def _where(self, **more: int) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, **more}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)
