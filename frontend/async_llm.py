"""AsyncLLM: the engine as an asyncio program sees it.

Puts the parts together: arguments become a core process, prompts become wire messages, and each request gets
its stream. Holds no request's state itself: that is `request_table.py`'s.
"""

from __future__ import annotations

import asyncio
import collections
import copy
import logging
import random
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

from ..ipc.config import EngineConfig
from ..ipc.errors import (
    ConfigError,
    EngineDeadError,
    EngineUnhealthyError,
    RequestCrashedError,
    RequestError,
)
from ..ipc.messages import Abort, AddRequest, ClientStats, Stats
from .call_forms import checked_id, checked_prompt_text, refuse_set, tell_apart
from .control import EngineControl
from .core_client import CoreClient
from .core_process import CoreProcess
from .detokenizer import DecoderFactory
from .engine_args import AsyncEngineArgs, attach_keys, check_attached, resolve
from .grammars import Grammars
from .logprobs import LogprobsAsked, TokenTexts
from .metrics import AnyMetric, core_restarts, engine_records
from .model_files import find_model
from .prompts import ParsedPrompt, Prompt, check_token_ids, parse_prompt
from .request_table import RequestTable
from .requests import Request
from .sampling_params import SamplingParams
from .sampling_wire import to_wire
from .stop_strings import StopStrings
from .streams import RequestStream
from .timeouts import RequestTimeouts, checked_timeouts
from .tokenizer import Tokenizer

logger = logging.getLogger("headrace")

HEALTH_SECONDS = 5.0
"""A core that does not answer a ping within it is called unhealthy."""
_LONG_PROMPT = 2048
"""Characters, about 1 ms of tokenizing; longer prompts are tokenized on a thread."""
_MAX_PRIORITY = 2**31 - 1


class AsyncLLM(EngineControl):
    """An LLM engine: `async for output in engine.generate(prompt, sampling_params, request_id)`.

    Made by `from_engine_args`, with or without a running event loop; works on one loop at a time and may go
    from one to the next. Errors: ConfigError when it cannot be built as asked, RequestError when one request
    cannot be served, EngineDeadError when the engine is gone.
    """

    def __init__(self, engine_args: AsyncEngineArgs) -> None:
        """Start the engine core (or attach to one) and wait until it serves."""
        if not isinstance(engine_args, AsyncEngineArgs):
            message = f"engine_args must be an AsyncEngineArgs, got {engine_args!r:.100}"
            raise ConfigError(message, parameter="engine_args", limit="AsyncEngineArgs")
        self._table = RequestTable()
        self._unclaimed: dict[str, Request] = {}
        """Requests of `add_request` that nobody reads yet."""
        self._orphans: collections.deque[Request] = collections.deque()
        """Requests whose stream was dropped, to be aborted."""
        self._was_shut_down = False
        self._tokenizer: Tokenizer | None
        if engine_args.engine_core_address is None:
            self._client, self._tokenizer = self._embed(engine_args)
            # vLLM's meaning of `seed`: the same program says the same again.
            self._seeds = random.Random(self.config.seed)
        else:
            self._client, self._tokenizer = self._attach(engine_args, engine_args.engine_core_address)
            self._seeds = random.SystemRandom()
        self._decoders = None if self._tokenizer is None else DecoderFactory(self._tokenizer)
        self._grammars = Grammars(self.config)
        self._texts = None if self._decoders is None else TokenTexts(self._decoders.piece)

    @classmethod
    def from_engine_args(
        cls,
        engine_args: AsyncEngineArgs,
        start_engine_loop: bool = True,
        usage_context: object = None,
        stat_loggers: object = None,
    ) -> AsyncLLM:
        """Build the engine and wait until it serves.

        `start_engine_loop` and `usage_context` are accepted for vLLM's sake and change nothing.
        """
        if stat_loggers:
            message = "stat_loggers is not supported yet; use do_log_stats()"
            raise ConfigError(message, parameter="stat_loggers", value=stat_loggers, limit=None)
        return cls(engine_args)

    # --- requests ------------------------------------------------------------------------------------

    def generate(
        self,
        *args: Any,
        prompt: Prompt | None = None,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        prompt_text: str | None = None,
        timeout: float | RequestTimeouts | None = None,
        **unsupported: Any,
    ) -> RequestStream:
        """Stream one request's outputs.

        Called as `(prompt, sampling_params, request_id)`, as `(request_id, prompt, sampling_params)`, by
        keywords, or as `(request_id)` after `add_request`. Without sampling parameters the model's defaults
        hold; without an id a fresh one is used. Nothing happens before the first iteration, where errors are
        raised too. With a `timeout` (seconds in all, or more exactly) a request that takes longer ends with
        finish_reason "timeout".
        """
        given = tell_apart(args)
        for name, value in (
            ("prompt", prompt),
            ("sampling_params", sampling_params),
            ("request_id", request_id),
        ):
            if value is not None:
                if name in given:
                    raise TypeError(f"generate() got {name} twice")
                given[name] = value
        if set(given) == {"request_id"}:
            return self._stream_of(given["request_id"])
        new_id = checked_id(given.get("request_id"))

        async def start() -> Request:
            refuse_set(unsupported)
            return await self._submit(
                new_id,
                given.get("prompt"),
                given.get("sampling_params"),
                priority,
                prompt_text,
                checked_timeouts(timeout),
            )

        return RequestStream(new_id, start, self._abort_request, self._abort_soon)

    async def add_request(
        self,
        request_id: str | None,
        prompt: Prompt,
        params: SamplingParams | None = None,
        arrival_time: float | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        prompt_text: str | None = None,
        timeout: float | RequestTimeouts | None = None,  # noqa: ASYNC109 (the core keeps it)
        **unsupported: Any,
    ) -> RequestStream:
        """Start a request now, to be read later: from the stream returned, or by `generate(request_id)`.

        It runs and keeps its outputs until it is read or aborted. `arrival_time` is accepted for vLLM's sake.
        """
        if params is not None and sampling_params is not None:
            raise TypeError("add_request() got params and sampling_params")
        refuse_set(unsupported)
        new_id = checked_id(request_id)
        request = await self._submit(
            new_id, prompt, params or sampling_params, priority, prompt_text, checked_timeouts(timeout)
        )
        self._unclaimed[new_id] = request
        return self._stream_of(new_id)

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """End requests now; unknown ids are ignored.

        Their readers get a last output with finish_reason "abort". Returns when the core has heard of it too.
        """
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        found = [request for one in ids if (request := self._table.get(one)) is not None]
        if not found:
            return
        for request in found:
            self._abort_request(request)
        if self._client.trouble:
            return  # the next core will not hear of it at all
        with suppress(EngineDeadError, RequestCrashedError, TimeoutError):  # a dead core has ended them, too
            await self._client.call("ping", HEALTH_SECONDS)

    abort_request = abort

    async def wait_for_requests_to_drain(self, drain_timeout: float = 300) -> None:
        """Return when no request of this frontend runs. Raises TimeoutError."""
        async with asyncio.timeout(drain_timeout):
            await self._table.wait_until_empty()

    # --- about the engine ----------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """The engine's configuration, as its core told it."""
        return self._client.config

    @property
    def max_model_len(self) -> int:
        """Longest prompt + output, tokens; may be less than the model's when the KV cache is small."""
        return self._client.info.max_model_len

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None with `skip_tokenizer_init`."""
        return self._tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError with `skip_tokenizer_init`."""
        if self._tokenizer is None:
            message = "there is no tokenizer: the engine was made with skip_tokenizer_init=True"
            raise RequestError(message, parameter="skip_tokenizer_init", value=True, limit=False)
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds for requests without sampling parameters: the model's generation_config.json."""
        return SamplingParams(**self.config.default_sampling)  # type: ignore[arg-type]

    @property
    def num_unfinished_requests(self) -> int:
        return len(self._table)

    @property
    def is_running(self) -> bool:
        return self._client.dead_error is None

    @property
    def is_stopped(self) -> bool:
        return not self.is_running

    @property
    def errored(self) -> bool:
        """The engine is gone, and not because of `shutdown`."""
        return self.dead_error is not None and not self._was_shut_down

    @property
    def dead_error(self) -> EngineDeadError | None:
        """Why the engine is gone; None while it runs."""
        return self._client.dead_error

    async def check_health(self) -> None:
        """Return when requests make progress, however many there are.

        Raises EngineUnhealthyError when they do not at present: a core or worker is hung, or starts again.
        EngineDeadError when that has failed.
        """
        trouble = self._client.trouble
        if not trouble:
            try:
                trouble = (await self._client.call("ping", HEALTH_SECONDS)).unhealthy
            except (TimeoutError, RequestCrashedError):
                silent = f"the engine core did not answer within {HEALTH_SECONDS:g} s"
                trouble = self._client.trouble or silent
        if trouble:
            raise EngineUnhealthyError(trouble)

    async def get_metrics(self) -> list[AnyMetric]:
        """This frontend's counters and histograms, and the engine's own, in vLLM's Prometheus names."""
        return [*await self.get_engine_metrics(), *self.own_metrics()]

    async def get_engine_metrics(self) -> list[AnyMetric]:
        """The engine's own part of `get_metrics`, the same for all its frontends."""
        return list(engine_records(self.config, *await self.get_stats(), self._labels()))

    def own_metrics(self) -> list[AnyMetric]:
        """This frontend's part of `get_metrics`."""
        labels = self._labels()
        return [*self._table.metrics.records(labels), core_restarts(self._client.num_restarts, labels)]

    def _labels(self) -> dict[str, str]:
        return {"model_name": self.config.served_model_name, "engine": "0"}

    async def get_stats(self) -> tuple[Stats, list[ClientStats]]:
        """The engine at this moment, and each client's share of it."""
        reply = await self._client.call("stats")
        assert reply.stats is not None
        return reply.stats, reply.clients

    async def do_log_stats(self) -> None:
        """Log the engine's state (level INFO); nothing with `disable_log_stats`."""
        if not self.config.log_stats:
            return
        stats = (await self._client.call("stats")).stats
        if stats is not None:
            logger.info(
                "%d running, %d waiting, %d of %d blocks free, %d prompt and %d generated tokens, "
                "prefix cache %d of %d, %d preemptions",
                stats.num_running,
                stats.num_waiting,
                stats.num_free_blocks,
                stats.num_blocks,
                stats.prompt_tokens,
                stats.generation_tokens,
                stats.prefix_cache_hits,
                stats.prefix_cache_queries,
                stats.num_preemptions,
            )

    async def is_tracing_enabled(self) -> bool:
        return False

    # --- its end -------------------------------------------------------------------------------------

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine, or leave the one attached to. Readers get EngineDeadError. Idempotent.

        `timeout` is accepted for vLLM's sake: it never takes longer than a few seconds.
        """
        if self._client.dead_error is None:
            self._was_shut_down = True
        self._grammars.close()
        self._client.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # --- inside --------------------------------------------------------------------------------------

    def _embed(self, args: AsyncEngineArgs) -> tuple[CoreClient, Tokenizer | None]:
        config = resolve(args)
        core = CoreProcess(config)
        try:
            # Meanwhile the core starts.
            tokenizer = None if config.tokenizer is None else Tokenizer.load(config.tokenizer)
        except BaseException:
            core.stop()
            raise
        core.wait_until_ready()
        return CoreClient.embed(core, self._table), tokenizer

    def _attach(self, args: AsyncEngineArgs, address: str) -> tuple[CoreClient, Tokenizer | None]:
        keys = attach_keys(args)
        client = CoreClient.attach(address, self._table, keys, args.engine_core_reconnect_seconds)
        try:
            check_attached(args, client.config)
            path = client.config.tokenizer
            if args.tokenizer is not None:
                path = str(find_model(args.tokenizer, with_weights=False, parameter="tokenizer"))
            skip = args.skip_tokenizer_init or path is None
            return client, None if skip else Tokenizer.load(str(path))
        except BaseException:
            client.close()
            raise

    async def _submit(
        self,
        request_id: str,
        prompt: object,
        params: SamplingParams | None,
        priority: int,
        prompt_text: str | None,
        timeouts: RequestTimeouts,
    ) -> Request:
        """Check, tokenize and send one request."""
        begun = time.monotonic()
        self._client.use_running_loop()
        self._abort_orphans()
        params = self._checked_params(params)
        self._check_priority(priority)
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
                grammar = await self._grammars.grammar(params.structured_outputs)
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
        sampling = to_wire(params, self.config, self._tokenizer, seed, grammar)
        ids = request.prompt_token_ids
        packed = check_token_ids(ids, self.config.vocab_size, self.max_model_len)
        room = self.max_model_len - len(ids)
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
        tokenizer = self.get_tokenizer()
        if len(prompt.text) < _LONG_PROMPT:
            return tokenizer.encode(prompt.text)
        return await asyncio.to_thread(tokenizer.encode_long, prompt.text)

    def _checked_params(self, params: SamplingParams | None) -> SamplingParams:
        """A copy of our own: the caller may change his at any time."""
        if params is None:
            return self.get_default_sampling_params()
        if not isinstance(params, SamplingParams):
            message = f"sampling_params must be a SamplingParams, got {params!r:.100}"
            raise RequestError(message, parameter="sampling_params", limit="SamplingParams")
        params = copy.copy(params)
        params.verify()
        if params.stop and self._tokenizer is None:
            message = "stop strings need a tokenizer, but the engine was made with skip_tokenizer_init=True"
            raise RequestError(message, parameter="stop", value=params.stop, limit="stop_token_ids")
        return params

    def _check_priority(self, priority: int) -> None:
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > _MAX_PRIORITY:
            limit = f"an integer of at most {_MAX_PRIORITY} either way"
            message = f"priority must be {limit}, got {priority!r}"
            raise RequestError(message, parameter="priority", value=priority, limit=limit)
        if priority and self.config.scheduling_policy != "priority":
            message = f"priority={priority} needs an engine with scheduling_policy='priority'"
            raise RequestError(message, parameter="priority", value=priority, limit=0)

    def _stream_of(self, request_id: str) -> RequestStream:
        """The stream of a request that was added before."""

        async def claim() -> Request:
            self._client.use_running_loop()
            request = self._unclaimed.pop(request_id, None)
            if request is None:
                message = (
                    f"no request {request_id!r} waits to be read: add_request makes one, and "
                    "generate(prompt, sampling_params, request_id) does both"
                )
                raise RequestError(message, parameter="request_id", value=request_id)
            return request

        return RequestStream(request_id, claim, self._abort_request, self._abort_soon)

    def _abort_request(self, request: Request) -> None:
        """On the event loop."""
        numbers = self._table.drop(request)
        request.abort()
        if numbers and self._client.dead_error is None:
            self._client.send(Abort(numbers))

    def _abort_soon(self, request: Request) -> None:
        self._orphans.append(request)
        loop = self._client.loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the next request on a new one does it
                loop.call_soon_threadsafe(self._abort_orphans)

    def _abort_orphans(self) -> None:
        while self._orphans:
            self._abort_request(self._orphans.popleft())


AsyncLLMEngine = AsyncLLM
