"""LLM: blocking generation over lists. A thin shell around AsyncLLM on an event loop of its own.

The loop runs on a private thread, so that it works in notebooks and inside other event loops too.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

from ..ipc.config import EngineConfig
from ..ipc.errors import EngineDeadError, RequestError
from .async_llm import AsyncLLM
from .beam_search import BeamSearchOutput, BeamSearchParams, beam_search
from .call_forms import refuse_set
from .chat_messages import check_variables, plain_messages
from .checks import INT32_MAX, integer, refusal
from .control import BlockingControl
from .engine_args import AsyncEngineArgs
from .metrics import AnyMetric
from .outputs import RequestOutput
from .prompts import Prompt, parse_prompt
from .sampling_params import RequestOutputKind, SamplingParams
from .streams import RequestStream
from .timeouts import RequestTimeouts
from .tokenizer import Tokenizer

Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""One conversation: [{"role": "user", "content": ...}, ...]."""
Result = TypeVar("Result")


class LLM(BlockingControl):
    """An engine for offline use: `LLM("demo").generate(["Once upon a time"])`.

    Arguments are those of `AsyncEngineArgs`. Raises ConfigError when it cannot be built as asked.
    """

    _engine: AsyncLLM

    def __init__(self, model: str, **engine_args: Any) -> None:
        # One program's own requests: their number is its affair.
        bounds = {"max_queued_requests": INT32_MAX, "max_queued_tokens": INT32_MAX}
        self._start(AsyncEngineArgs(model=model, **bounds | engine_args))

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> LLM:
        llm = cls.__new__(cls)
        llm._start(engine_args)
        return llm

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: Sequence[int] | None = None,
        timeout: float | RequestTimeouts | None = None,
        **unsupported: Any,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; the outputs are in the order of the prompts.

        `sampling_params` are for all, one for each, or None for the model's defaults; `timeout` (seconds,
        or more exactly) is for each. Raises RequestError for the first prompt that cannot be served; then
        nothing goes on.
        """
        streams = self._start_requests(prompts, sampling_params, priority, timeout, unsupported)
        return self._finish(streams, use_tqdm)

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        timeout: float | RequestTimeouts | None = None,
        **unsupported: Any,
    ) -> list[str]:
        """Start requests, as `generate` does, and return their ids at once; they run meanwhile.

        Raises RequestError for the first prompt that cannot be served; then none of these goes on.
        """
        streams = self._start_requests(prompts, sampling_params, priority, timeout, unsupported)
        self._enqueued += streams
        return [stream.request_id for stream in streams]

    def wait_for_completion(
        self, output_type: object = None, *, use_tqdm: bool | Callable[..., Any] = True
    ) -> list[RequestOutput]:
        """The outputs of all requests enqueued since the last call, in that order.

        `output_type` may be RequestOutput: there is no other. Raises the first error of any of them; then the
        others do not go on either.
        """
        if output_type not in (None, RequestOutput):
            raise refusal("output_type", output_type, "RequestOutput, or None")
        streams = self._enqueued.copy()
        self._enqueued.clear()
        return self._finish(streams, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, each rendered by the model's chat template.

        Options: `chat_template` (Jinja, instead of the model's), `add_generation_prompt=True`,
        `continue_final_message=False`, `tools` (what templates show of them) and `chat_template_kwargs`.
        """
        return self.generate(self._rendered(messages, **options), sampling_params, use_tqdm=use_tqdm)

    def enqueue_chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        **options: Any,
    ) -> list[str]:
        """Start what `chat` waits for, as `enqueue` does; `use_tqdm` changes nothing."""
        return self.enqueue(self._rendered(messages, **options), sampling_params)

    def _rendered(
        self,
        messages: Messages | Sequence[Messages],
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **unsupported: Any,
    ) -> list[Prompt]:
        """A prompt of each conversation."""
        refuse_set(unsupported)
        if chat_template_content_format not in ("auto", "string"):
            name, limit = "chat_template_content_format", "'auto' or 'string': there is only text"
            raise refusal(name, chat_template_content_format, limit)
        tokenizer = self.get_tokenizer()
        variables = check_variables(chat_template_kwargs or {})
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if is_one else messages
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = tokenizer.apply_chat_template(
                plain_messages(conversation),
                tokenize=False,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **variables,
            )
            assert isinstance(text, str)
            parsed = parse_prompt(text)  # it may hold what cannot be tokenized
            ids = tokenizer.encode(text, add_special_tokens=False)
            prompts.append({"prompt_token_ids": ids, "prompt": parsed.text})
        return prompts

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: int | None = None,
        **unsupported: Any,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, `concurrency_limit` prompts at a time (None: all)."""
        refuse_set(unsupported)
        several = _several(prompts)
        if concurrency_limit is None:
            concurrency_limit = max(len(several), 1)
        limit = "an integer of at least 1"
        at_once = asyncio.Semaphore(integer("concurrency_limit", concurrency_limit, 1, INT32_MAX, limit))

        async def one(prompt: Prompt, advance: Callable[[int], None]) -> BeamSearchOutput:
            async with at_once:
                output = await beam_search(self._engine, prompt, params)
            advance(sum(len(sequence.logprobs) for sequence in output.sequences))
            return output

        with _progress(len(several), use_tqdm) as advance:
            return self._run(_all(one(prompt, advance) for prompt in several))

    def get_tokenizer(self) -> Tokenizer:
        return self._engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        return self._engine.get_default_sampling_params()

    def get_metrics(self) -> list[AnyMetric]:
        """Counters, gauges and histograms so far, in vLLM's Prometheus names."""
        return self._run(self._engine.get_metrics())

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    def shutdown(self) -> None:
        """End the engine. Idempotent; also done by `with`, garbage collection and the interpreter's end."""
        self._finalizer()

    close = shutdown

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _start(self, engine_args: AsyncEngineArgs) -> None:
        self._engine = AsyncLLM(engine_args)
        self._enqueued: list[RequestStream] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="headrace LLM", daemon=True)
        self._thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._engine, self._loop, self._thread)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run it on the loop and wait. Ctrl-C here cancels it there."""
        if not self._finalizer.alive:
            work.close()
            raise EngineDeadError("the engine has been shut down")
        if not self._thread.is_alive():
            work.close()
            raise EngineDeadError("the engine belongs to another process, which forked this one")
        future: Future[Result] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _start_requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        timeout: float | RequestTimeouts | None,
        unsupported: dict[str, Any],
    ) -> list[RequestStream]:
        refuse_set(unsupported)
        several = _several(prompts)
        params = _for_each(sampling_params, len(several), "sampling_params")
        priorities = [0] * len(several) if priority is None else list(priority)
        _check_length("priority", priorities, len(several))
        return self._run(self._add_all(several, params, priorities, timeout))

    async def _add_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams | None],
        priorities: Sequence[int],
        limit: float | RequestTimeouts | None,
    ) -> list[RequestStream]:
        streams: list[RequestStream] = []
        try:
            for prompt, wanted, priority in zip(prompts, params, priorities, strict=True):
                final = self.get_default_sampling_params() if wanted is None else copy.copy(wanted)
                final.output_kind = RequestOutputKind.FINAL_ONLY
                streams.append(
                    await self._engine.add_request(None, prompt, final, priority=priority, timeout=limit)
                )
        except BaseException:
            await self._engine.abort([stream.request_id for stream in streams])
            raise
        return streams

    def _finish(
        self, streams: Sequence[RequestStream], use_tqdm: bool | Callable[..., Any]
    ) -> list[RequestOutput]:
        with _progress(len(streams), use_tqdm) as advance:
            return self._run(_finish_all(streams, advance))


async def _finish_all(
    streams: Sequence[RequestStream], advance: Callable[[int], None]
) -> list[RequestOutput]:
    async def one(stream: RequestStream) -> RequestOutput:
        output = await anext(stream)
        advance(sum(len(part.token_ids) for part in output.outputs))
        return output

    return await _all(one(stream) for stream in streams)


def _stop(engine: AsyncLLM, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    if not thread.is_alive():  # in a forked process: all this is its parent's
        return
    if threading.current_thread() is thread:  # the collector struck there
        engine.shutdown()
        loop.stop()
        return

    async def stop() -> None:
        engine.shutdown()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


async def _all(works: Iterator[Awaitable[Result]]) -> list[Result]:
    """All results in order; the first error cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _several(prompts: Any) -> list[Prompt]:
    """One prompt or a sequence of them: a list of integers is one."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        message = f"prompts must be a prompt or a list of prompts, got {prompts!r:.100}"
        raise RequestError(message, parameter="prompts", value=type(prompts).__name__)
    return [list(prompts)] if prompts and isinstance(prompts[0], int) else list(prompts)


def _for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, name: str
) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, (list, tuple)) or not all(isinstance(p, SamplingParams) for p in params):
        message = f"{name} must be a SamplingParams or a list of them, got {params!r:.100}"
        raise RequestError(message, parameter=name, limit="SamplingParams")
    _check_length(name, params, count)
    return params


def _check_length(name: str, values: Sequence[object], count: int) -> None:
    if len(values) != count:
        message = f"{name} must have one item for each of the {count} prompts, got {len(values)}"
        raise RequestError(message, parameter=name, value=len(values), limit=count)


@contextmanager
def _progress(count: int, use_tqdm: bool | Callable[..., Any]) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error: finished prompts and generated tokens per second.

    To be called with the number of tokens of each prompt that is done.
    """
    if use_tqdm is False:
        yield lambda num_tokens: None
        return
    bar_class: Callable[..., Any]
    if callable(use_tqdm):
        bar_class = use_tqdm
    else:
        from tqdm.auto import tqdm  # type: ignore[import-untyped] # noqa: PLC0415 - 60 ms

        bar_class = tqdm
    with bar_class(total=count, desc="Processed prompts", dynamic_ncols=True) as bar:
        total = 0

        def advance(num_tokens: int) -> None:
            nonlocal total
            total += num_tokens
            seconds = bar.format_dict["elapsed"]
            if seconds:
                bar.postfix = f"{total / seconds:.1f} tokens/s"
            bar.update(1)

        yield advance
