"""Run: the generations behind one HTTP request, one stream for each of its prompts."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request

from ...ipc.errors import RequestError
from ..outputs import RequestMetrics, RequestOutput
from ..sampling_params import RequestOutputKind, SamplingParams
from ..streams import RequestStream
from .beams import BeamStream
from .errors import as_api_error
from .logprob_forms import LogprobForms
from .protocol import Choices, Generation
from .service import Service

LONG_TEXT = 2048
"""Characters, about 1 ms of tokenizing; longer ones are tokenized on a thread."""
_ID = re.compile("[ -~]{1,128}")
"""It stands in a header."""
MAX_CHOICES = 1024
"""Of one HTTP request."""


class Usage:
    """Tokens that a run has cost so far."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Run:
    """`async for index, output in run.outputs()`, where index counts the prompts.

    Nothing starts before the first iteration, where errors are raised; one error ends the whole run, and so
    does closing the iterator.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        prefix: str,
        body: Generation,
        prompts: Sequence[dict[str, Any]],
        params: SamplingParams,
    ) -> None:
        if params.n * len(prompts) > MAX_CHOICES:
            message = f"n={params.n} for {len(prompts)} prompts is more than {MAX_CHOICES} choices"
            raise RequestError(message, parameter="n", value=params.n, limit=MAX_CHOICES)
        self.id = f"{prefix}-{_given_id(request, body) or secrets.token_hex(12)}"
        self.usage = Usage()
        self._renamed = body.renamed()
        self.prompts = [prompt.get("prompt") or prompt["prompt_token_ids"] for prompt in prompts]
        self._num_choices = params.n * len(prompts)
        self._shows_timings = service.options.enable_per_request_metrics
        self._started = [False] * len(prompts)
        self._latest: dict[int, RequestMetrics] = {}
        self._ends: list[str] = []
        request.state.run = self  # for the access log
        params.output_kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
        timeout = _least(body.timeout, service.options.request_timeout)
        salted = [{**prompt, "cache_salt": body.cache_salt} for prompt in prompts]
        self._streams: list[RequestStream | BeamStream]
        if isinstance(body, Choices) and body.use_beam_search:
            self._streams = [BeamStream(service.engine, each, body, params, timeout) for each in salted]
        else:
            self._streams = [
                service.engine.generate(
                    prompt=prompt,
                    sampling_params=params,
                    # Clients may repeat their ids; the engine's are unique.
                    request_id=f"{self.id}-{secrets.token_hex(4)}",
                    priority=body.priority or 0,
                    timeout=timeout,
                )
                for prompt in salted
            ]

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        try:
            if len(self._streams) == 1:
                async for output in self._streams[0]:
                    self._count(0, output)
                    yield 0, output
            else:
                async for index, output in _merged(self._streams):
                    self._count(index, output)
                    yield index, output
        except RequestError as error:
            raise as_api_error(error, self._renamed) from error
        finally:
            for stream in self._streams:
                stream.abort()

    def timings(self) -> dict[str, Any]:
        """{"metrics": ...} of a request with one choice, where the server is to show it.

        Names and meanings are vLLM's: all but the first count from the end of the queue.
        """
        metrics = self._latest.get(0)
        if metrics is None or self._num_choices > 1 or not self._shows_timings:
            return {}
        times = {
            "queue_time_ms": metrics.queued_seconds,
            "time_to_first_token_ms": metrics.prefill_seconds,
            "generation_time_ms": metrics.last_token_ts - metrics.first_token_ts,
            "mean_itl_ms": metrics.mean_inter_token_latency,
        }
        shown = {name: None if time is None else 1000 * time for name, time in times.items()}
        seconds = metrics.last_token_ts - metrics.scheduled_ts
        speed = metrics.num_generation_tokens / seconds if seconds > 0 else None
        return {"metrics": {**shown, "tokens_per_second": speed}}

    def summary(self) -> dict[str, Any]:
        """Figures for the access log. The times are those of the first prompt."""
        usage = self.usage
        figures: dict[str, Any] = {
            "id": self.id,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish": ",".join(self._ends) or "aborted",
        }
        metrics = self._latest.get(0)
        if metrics is not None:
            times = {
                "queued": metrics.queued_seconds,
                "first_token": metrics.first_token_latency,
                "mean_inter_token": metrics.mean_inter_token_latency,
            }
            figures |= {name: seconds for name, seconds in times.items() if seconds is not None}
        return figures

    def _count(self, index: int, output: RequestOutput) -> None:
        if output.metrics is not None:
            self._latest[index] = output.metrics
        usage = self.usage
        if not self._started[index]:
            self._started[index] = True
            usage.prompt_tokens += len(output.prompt_token_ids)
            usage.cached_tokens += output.num_cached_tokens or 0
        for part in output.outputs:
            usage.completion_tokens += len(part.token_ids)
            if part.finish_reason is not None:
                self._ends.append(part.finish_reason)


def _given_id(request: Request, body: Generation) -> str | None:
    """A header's, which proxies set, or the body's. Raises RequestError."""
    in_header = request.headers.get("x-request-id")
    for name, given in (("x-request-id", in_header), ("request_id", body.request_id)):
        if given is None:
            continue
        if not _ID.fullmatch(given):
            limit = "1 to 128 printable ASCII characters"
            message = f"{name} must be {limit}, got {given!r:.200}"
            raise RequestError(message, parameter=name, value=given, limit=limit)
        return given
    return None


def _least(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)


async def _merged(
    streams: Sequence[RequestStream | BeamStream],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                output = task.result()
                if not output.finished:
                    waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, output
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def encode(service: Service, text: str, add_special_tokens: bool) -> list[int]:
    tokenizer = service.tokenizer
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode_long, text, add_special_tokens)


def truncated(service: Service, body: Generation, params: SamplingParams, ids: list[int]) -> list[int]:
    """What `truncate_prompt_tokens` and `truncation_side` leave of a prompt. Raises RequestError."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return ids
    if keep == -1:
        keep = max(service.engine.max_model_len - (params.max_tokens or 1), 1)
    if keep < 1:
        message = f"truncate_prompt_tokens must be at least 1, or -1, got {keep}"
        raise RequestError(message, parameter="truncate_prompt_tokens", value=keep, limit="at least 1, or -1")
    return ids[:keep] if body.truncation_side == "right" else ids[-keep:]


def logprob_forms(service: Service, body: Generation, top: int | None) -> LogprobForms | None:
    """None when no logprobs were asked for. `top`: how many tokens at each position."""
    if top is None and body.prompt_logprobs is None:
        return None
    if body.logprob_token_ids is not None:
        top = len(body.logprob_token_ids)
    return LogprobForms(service.tokenizer, top or 0, bool(body.return_tokens_as_token_ids))
