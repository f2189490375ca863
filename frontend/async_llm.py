"""AsyncLLM: the engine as an asyncio program sees it.

Puts the parts together: arguments become a core process, `submission.py` sends it requests, and each gets its
stream. Holds no request's state itself: that is `request_table.py`'s.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

from ..ipc.config import EngineConfig
from ..ipc.errors import (
    ConfigError,
    EngineDeadError,
    EngineUnhealthyError,
    RequestCrashedError,
)
from ..ipc.messages import Abort, ClientStats, Stats
from .call_forms import checked_id, refuse_set, tell_apart
from .control import EngineControl
from .core_client import CoreClient
from .core_process import CoreProcess
from .engine_args import AsyncEngineArgs, attach_keys, check_attached, resolve
from .metrics import AnyMetric, core_restarts, engine_records
from .model_files import find_model
from .prompts import Prompt
from .request_table import RequestTable
from .requests import Request
from .sampling_params import SamplingParams
from .streams import RequestStream
from .submission import Submitter, default_params, existing
from .timeouts import RequestTimeouts, checked_timeouts
from .tokenizer import Tokenizer
from .unread import UnreadRequests

logger = logging.getLogger("headrace")

HEALTH_SECONDS = 5.0
"""A core that does not answer a ping within it is called unhealthy."""


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
        self._unread = UnreadRequests()
        self._orphans: collections.deque[Request] = collections.deque()
        """Requests whose stream was dropped, to be aborted."""
        self._was_shut_down = False
        self._tokenizer: Tokenizer | None
        if engine_args.engine_core_address is None:
            self._client, self._tokenizer = self._embed(engine_args)
            # vLLM's meaning of `seed`: the same program says the same again.
            seeds = random.Random(self.config.seed)
        else:
            self._client, self._tokenizer = self._attach(engine_args, engine_args.engine_core_address)
            seeds = random.SystemRandom()
        self._submitter = Submitter(self._client, self._table, self._tokenizer, seeds)

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
            added_id = given["request_id"]
            return self._stream_of(added_id, lambda: self._unread.find(added_id))
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

        It runs, and its outputs are kept until they are read; `generate(request_id)` finds the latest 10,000
        of those that have ended. `arrival_time` is accepted for vLLM's sake.
        """
        if params is not None and sampling_params is not None:
            raise TypeError("add_request() got params and sampling_params")
        refuse_set(unsupported)
        new_id = checked_id(request_id)
        request = await self._submit(
            new_id, prompt, params or sampling_params, priority, prompt_text, checked_timeouts(timeout)
        )
        self._unread.add(request)
        return self._stream_of(new_id, lambda: request)

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
        return existing(self._tokenizer)

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds for requests without sampling parameters: the model's generation_config.json."""
        return default_params(self.config)

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
        self._submitter.grammars.close()
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
        self._client.use_running_loop()
        self._abort_orphans()
        return await self._submitter.submit(request_id, prompt, params, priority, prompt_text, timeouts)

    def _stream_of(self, request_id: str, find: Callable[[], Request]) -> RequestStream:
        """The stream of a request that was added before."""

        async def claim() -> Request:
            self._client.use_running_loop()
            return self._unread.claim(find())

        return RequestStream(request_id, claim, self._abort_request, self._abort_soon)

    def _abort_request(self, request: Request) -> None:
        """At once; but where the engine cannot be used, as soon as its loop runs."""
        try:
            self._client.use_running_loop()
        except EngineDeadError:
            pass  # its end was the end of all requests
        except RuntimeError:
            self._abort_soon(request)
            return
        numbers = self._table.drop(request)
        request.abort()
        if numbers:
            self._client.send(Abort(numbers))

    def _abort_soon(self, request: Request) -> None:
        self._orphans.append(request)
        loop = self._client.loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the next request on a new one does it
                loop.call_soon_threadsafe(self._abort_orphans)

    def _abort_orphans(self) -> None:
        for _ in range(len(self._orphans)):
            self._abort_request(self._orphans.popleft())


AsyncLLMEngine = AsyncLLM
