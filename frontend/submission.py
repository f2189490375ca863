"""A request's way to the core: checked, tokenized, turned into its message and sent."""

from __future__ import annotations

import asyncio
import copy
import random
import time

from ..ipc.config import EngineConfig
from ..ipc.errors import RequestError
from ..ipc.messages import AddRequest
from .call_forms import checked_prompt_text
from .core_client import CoreClient
from .detokenizer import DecoderFactory
from .grammars import Grammars
from .logprobs import LogprobsAsked, TokenTexts
from .prompts import ParsedPrompt, check_token_ids, parse_prompt
from .request_table import RequestTable
from .requests import Request
from .sampling_params import SamplingParams
from .sampling_wire import to_wire
from .stop_strings import StopStrings
from .timeouts import RequestTimeouts
from .tokenizer import Tokenizer

_LONG_PROMPT = 2048
"""Characters, about 1 ms of tokenizing; longer prompts are tokenized on a thread."""
_MAX_PRIORITY = 2**31 - 1


class Submitter:
    """Sends one client's requests to its core, and enters them in its table."""

    def __init__(
        self, client: CoreClient, table: RequestTable, tokenizer: Tokenizer | None, seeds: random.Random
    ) -> None:
        """`seeds`: of requests that name none."""
        self.grammars = Grammars(client.config)
        self._client = client
        self._config = client.config
        self._table = table
        self._tokenizer = tokenizer
        self._seeds = seeds
        self._decoders = None if tokenizer is None else DecoderFactory(tokenizer)
        self._texts = None if self._decoders is None else TokenTexts(self._decoders.piece)

    async def submit(
        self,
        request_id: str,
        prompt: object,
        params: SamplingParams | None,
        priority: int,
        prompt_text: str | None,
        timeouts: RequestTimeouts,
    ) -> Request:
        """Raises RequestError when it cannot be served, and EngineDeadError."""
        begun = time.monotonic()
        params = self._checked_params(params)
        _check_priority(priority, self._config.scheduling_policy)
        parsed = parse_prompt(prompt)
        if request_id in self._table:
            message = f"request_id {request_id!r} is in use by a request that has not ended"
            raise RequestError(message, parameter="request_id", value=request_id, limit="a unique id")
        shown = checked_prompt_text(prompt_text)
        text = parsed.text if shown is None else shown
        kind, include_stop = params.output_kind, params.include_stop_str_in_output
        request = Request(request_id, text, [], kind, include_stop, self._table.metrics)
        self._table.reserve(request)
        try:
            request.prompt_token_ids = await self._encode(parsed)
            grammar = None
            if params.structured_outputs is not None:
                grammar = await self.grammars.grammar(params.structured_outputs)
            left = timeouts.after(time.monotonic() - begun)
            self._send(request, params, priority, grammar, parsed.cache_salt, left)
        except BaseException:
            self._table.drop(request)
            raise
        return request

    def _send(
        self,
        request: Request,
        params: SamplingParams,
        priority: int,
        grammar: str | None,
        cache_salt: str,
        timeouts: RequestTimeouts,
    ) -> None:
        seed = self._seeds.getrandbits(62)
        sampling = to_wire(params, self._config, self._tokenizer, seed, grammar)
        ids = request.prompt_token_ids
        max_model_len = self._client.info.max_model_len
        packed = check_token_ids(ids, self._config.vocab_size, max_model_len)
        room = max_model_len - len(ids)
        if params.min_tokens > room:
            why = f"min_tokens={params.min_tokens} is more than the {room} tokens that the prompt leaves"
            raise RequestError(why, parameter="min_tokens", value=params.min_tokens, limit=room)
        show = params.detokenize and self._decoders is not None
        stops = params.stop if isinstance(params.stop, list) else []
        watch = StopStrings(stops, params.include_stop_str_in_output) if stops else None
        request.begin(
            [
                self._decoders(params.skip_special_tokens) if show and self._decoders else None
                for _ in range(params.n)
            ],
            [watch.twin() if watch else None for _ in range(params.n)],
            params.min_tokens,
            params.max_tokens,
            params.repetition_detection,
            LogprobsAsked(
                sampled=sampling.logprobs is not None or bool(sampling.logprob_token_ids),
                prompt=sampling.prompt_logprobs is not None,
                flat=params.flat_logprobs,
                texts=self._texts if show else None,
            ),
        )
        if request.is_aborted:  # while it was tokenized
            request.abort()
            return
        message = AddRequest(
            request=self._table.number(request),
            prompt=packed,
            sampling=sampling,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            n=params.n,
            priority=priority,
            cache_salt=cache_salt,
            queue_timeout=timeouts.queue,
            first_token_timeout=timeouts.first_token,
            total_timeout=timeouts.total,
        )
        is_sent = self._client.send(message)
        self._table.hand_over(request, message, is_sent=is_sent)

    async def _encode(self, prompt: ParsedPrompt) -> list[int]:
        if prompt.token_ids is not None:
            return prompt.token_ids
        assert prompt.text is not None
        tokenizer = existing(self._tokenizer)
        if len(prompt.text) < _LONG_PROMPT:
            return tokenizer.encode(prompt.text)
        return await asyncio.to_thread(tokenizer.encode_long, prompt.text)

    def _checked_params(self, params: SamplingParams | None) -> SamplingParams:
        """A copy of our own: the caller may change his at any time."""
        if params is None:
            return default_params(self._config)
        if not isinstance(params, SamplingParams):
            message = f"sampling_params must be a SamplingParams, got {params!r:.100}"
            raise RequestError(message, parameter="sampling_params", limit="SamplingParams")
        params = copy.copy(params)
        params.verify()
        if params.stop and self._tokenizer is None:
            message = "stop strings need a tokenizer, but the engine was made with skip_tokenizer_init=True"
            raise RequestError(message, parameter="stop", value=params.stop, limit="stop_token_ids")
        return params


def existing(tokenizer: Tokenizer | None) -> Tokenizer:
    """Raises RequestError with `skip_tokenizer_init`."""
    if tokenizer is None:
        message = "there is no tokenizer: the engine was made with skip_tokenizer_init=True"
        raise RequestError(message, parameter="skip_tokenizer_init", value=True, limit=False)
    return tokenizer


def default_params(config: EngineConfig) -> SamplingParams:
    """The model's generation_config.json."""
    return SamplingParams(**config.default_sampling)  # type: ignore[arg-type]


def _check_priority(priority: int, policy: str) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > _MAX_PRIORITY:
        limit = f"an integer of at most {_MAX_PRIORITY} either way"
        message = f"priority must be {limit}, got {priority!r}"
        raise RequestError(message, parameter="priority", value=priority, limit=limit)
    if priority and policy != "priority":
        message = f"priority={priority} needs an engine with scheduling_policy='priority'"
        raise RequestError(message, parameter="priority", value=priority, limit=0)
