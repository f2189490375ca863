"""POST /v1/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..logprobs import PromptLogprobs
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from .beams import refuse_unsearchable
from .endpoints import Endpoint
from .errors import bad_request
from .generation import MAX_CHOICES, Run, encode, logprob_forms, truncated
from .protocol import CompletionRequest
from .service import Service
from .streaming import EventStream, event, json_response, unless_gone


async def complete(service: Service, request: Request, body: CompletionRequest) -> Response:
    service.check_model(body.model)
    body.refuse_unsupported()
    params = body.sampling(
        service.engine.get_default_sampling_params(),
        structured_outputs=body.structure(),
        # Only the prompt is wanted, but there is no answer without a token.
        max_tokens=1 if _wants_prompt_alone(body) else None,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    refuse_unsearchable(body, params, service.engine)
    prompts = []
    for prompt in _several(body.prompt):
        prompts.append(await _prompt(service, body, params, prompt))
        await asyncio.sleep(0)  # there may be a thousand, and others have their streams
    run = Run(service, request, "cmpl", body, prompts, params)
    answer = _Answer(service, body, run, params.n)
    if body.stream:
        return EventStream(answer.events(), run.id)
    return await unless_gone(request, answer.whole())


def _wants_prompt_alone(body: CompletionRequest) -> bool:
    return bool(body.echo) and body.max_tokens == 0


class _Answer:
    """A run's outputs in the form of this route."""

    def __init__(self, service: Service, body: CompletionRequest, run: Run, n: int) -> None:
        self._service = service
        self._body = body
        self._run = run
        self._n = n
        self._head = {
            "id": run.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model,
        }
        self._logprobs = logprob_forms(service, body, body.logprobs)
        self._lengths: dict[int, int] = {}
        """Characters shown of each choice."""
        self._about_prompts: dict[int, PromptLogprobs] = {}
        """By prompt: a stream brings them once, perhaps before some of its choices begin."""

    async def whole(self) -> Response:
        choices: list[dict[str, Any]] = []
        async for index, output in self._run.outputs():
            choices += [self._choice(index, output, part) for part in output.outputs]
        choices.sort(key=lambda choice: choice["index"])
        answer = {**self._head, "choices": choices, "usage": self._run.usage.body()}
        answer |= self._run.timings()
        return json_response(answer, self._run.id)

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        shows_usage = options is not None and bool(options.continuous_usage_stats)
        async for index, output in self._run.outputs():
            for part in output.outputs:
                chunk: dict[str, Any] = {**self._head, "choices": [self._choice(index, output, part)]}
                if shows_usage:
                    chunk["usage"] = self._run.usage.body()
                yield event(chunk)
        if options is not None and options.include_usage:
            about = {"usage": self._run.usage.body(), **self._run.timings()}
            yield event({**self._head, "choices": [], **about})

    def _choice(self, index: int, output: RequestOutput, part: CompletionOutput) -> dict[str, Any]:
        body = self._body
        number = index * self._n + part.index
        is_first = number not in self._lengths
        if output.prompt_logprobs is not None:
            self._about_prompts[index] = output.prompt_logprobs
        about_prompt = self._about_prompts.get(index)
        text, tokens, positions = part.text, part.token_ids, part.logprobs or []
        if _wants_prompt_alone(body):
            text, tokens, positions = "", [], []
            self._run.usage.completion_tokens = 0
        choice: dict[str, Any] = {
            "index": number,
            "text": text,
            "logprobs": None,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = tokens
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if is_first and self._logprobs is not None and about_prompt is not None:
            choice["prompt_logprobs"] = self._logprobs.prompt(about_prompt)
        if is_first and body.echo:
            prompt = output.prompt_token_ids
            choice["text"] = (output.prompt or self._service.tokenizer.decode(prompt)) + text
            unknown = [None] * len(prompt)  # it ended before the prompt was computed
            tokens, positions = prompt + tokens, [*(about_prompt or unknown), *positions]
        offset = self._lengths.get(number, 0)
        self._lengths[number] = offset + len(choice["text"])
        if body.logprobs is not None and self._logprobs is not None:
            choice["logprobs"] = self._logprobs.completion(positions, tokens, offset)
        return choice


def _several(prompt: str | list[Any]) -> list[str | list[int]]:
    """The request's prompts. Raises ApiError."""
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(type(item) is int for item in prompt):
        return [prompt]
    if not prompt or not (
        all(type(item) is str for item in prompt) or all(type(item) is list for item in prompt)
    ):
        raise bad_request("prompt must be text, token ids, or a non-empty list of either", "prompt")
    if len(prompt) > MAX_CHOICES:
        raise bad_request(f"prompt holds {len(prompt)} prompts, at most {MAX_CHOICES} are taken", "prompt")
    return prompt


async def _prompt(
    service: Service, body: CompletionRequest, params: SamplingParams, prompt: str | list[int]
) -> dict[str, Any]:
    if isinstance(prompt, list):
        return {"prompt_token_ids": truncated(service, body, params, prompt)}
    ids = await encode(service, prompt, body.add_special_tokens is not False)
    kept = truncated(service, body, params, ids)
    return {"prompt": prompt if kept == ids else None, "prompt_token_ids": kept}


ENDPOINTS = [Endpoint("POST", "/v1/completions", complete, "Complete prompts", CompletionRequest)]
