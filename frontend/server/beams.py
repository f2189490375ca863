"""Beam search as the routes that generate see it: a stream of one output, which holds the best sequences."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from typing import Any

from ...ipc.errors import RequestError
from ..async_llm import AsyncLLM
from ..beam_search import BeamSearchParams, BeamSearchSequence, beam_search
from ..logprobs import LogprobsOnePosition
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from ..timeouts import checked_timeouts
from .protocol import SAMPLING, Choices

_MEANT = frozenset(
    [
        "ignore_eos",
        "include_stop_str_in_output",
        "max_tokens",
        "n",
        "seed",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "temperature",
    ]
)
"""The sampling parameters that a search can heed, or that have nothing to say in it."""


def refuse_unsearchable(body: Choices, params: SamplingParams, engine: AsyncLLM) -> None:
    """Raise RequestError for what a search cannot do; nothing when none is wanted."""
    if not body.use_beam_search:
        if body.length_penalty not in (None, 1.0):
            raise _refusal("length_penalty", body.length_penalty, "used with use_beam_search only")
        return
    plain = SamplingParams()
    for name in SAMPLING & set(body.__struct_fields__) - _MEANT:
        given = getattr(body, name)
        if given not in (None, [], {}, getattr(plain, name)):
            raise _refusal(name, given, f"{getattr(plain, name)!r} with use_beam_search")
    for name in ("structured_outputs", "prompt_logprobs"):
        if (value := getattr(params, name)) is not None:
            raise _refusal(name, value, "absent with use_beam_search")
    most = engine.config.max_logprobs
    if 0 <= most < 2 * params.n:
        limit = f"at most {most // 2} with use_beam_search, half of the engine's max_logprobs"
        raise _refusal("n", params.n, limit)
    _search_params(body, params, engine.max_model_len)
    checked_timeouts(body.timeout)
    if body.stream:
        raise _refusal("stream", True, "false with use_beam_search: the best is known at the end")


class BeamStream:
    """`async for output in stream`: one output, with `n` beams, best first."""

    def __init__(
        self,
        engine: AsyncLLM,
        prompt: dict[str, Any],
        body: Choices,
        params: SamplingParams,
        timeout: float | None,
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._body = body
        self._params = params
        self._timeout = timeout
        self._search = self._run()

    def __aiter__(self) -> BeamStream:
        return self

    async def __anext__(self) -> RequestOutput:
        return await anext(self._search)

    def abort(self) -> None:
        """A search ends with the task that waits for it."""

    async def _run(self) -> AsyncGenerator[RequestOutput, None]:
        params, body, prompt = self._params, self._body, self._prompt["prompt_token_ids"]
        found = await beam_search(
            self._engine,
            self._prompt,
            _search_params(body, params, max(self._engine.max_model_len - len(prompt), 1)),
            priority=body.priority or 0,
            timeout=self._timeout,
            num_logprobs=params.logprobs or 0,
        )
        outputs = [self._completion(i, beam, len(prompt)) for i, beam in enumerate(found.sequences)]
        yield RequestOutput(secrets.token_hex(8), self._prompt.get("prompt"), prompt, None, outputs, True)

    def _completion(self, index: int, beam: BeamSearchSequence, start: int) -> CompletionOutput:
        ids = beam.tokens[start:]
        hides_last = beam.finish_reason == "stop" and not self._params.include_stop_str_in_output
        shown = ids[:-1] if hides_last else ids
        return CompletionOutput(
            index,
            self._engine.get_tokenizer().decode(shown, self._params.skip_special_tokens),
            ids,
            beam.cum_logprob,
            None
            if self._params.logprobs is None
            else [_chosen_first(at, token) for at, token in zip(beam.logprobs, ids, strict=True)],
            finish_reason=beam.finish_reason,
        )


def _search_params(body: Choices, params: SamplingParams, room: int) -> BeamSearchParams:
    """Raises RequestError. `room`: the most tokens that there can be."""
    return BeamSearchParams(
        params.n,
        room if params.max_tokens is None else params.max_tokens,
        params.ignore_eos,
        params.temperature,
        1.0 if body.length_penalty is None else body.length_penalty,
        params.include_stop_str_in_output,
    )


def _chosen_first(position: LogprobsOnePosition, token: int) -> LogprobsOnePosition:
    return {token: position[token], **position}


def _refusal(name: str, value: object, limit: str) -> RequestError:
    message = f"{name} must be {limit}, got {value!r:.100}"
    return RequestError(message, parameter=name, value=value, limit=limit)
