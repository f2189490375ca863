"""Request and Completion: what has arrived for one request, and what its reader has not seen yet. Pure state.

Tokens are only noted when they arrive; text and output objects are made when the reader asks. So a reader
that lags costs nothing: it finds one merged delta, or the newest cumulative state. The exception are requests
with stop strings, whose text is watched token by token.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Mapping, Sequence

from ..ipc.messages import AddRequest, Finished, FinishReason
from .detokenizer import Decoder
from .logprobs import LogprobsAsked, LogprobView, PromptLogprobs, WireRow
from .metrics import FrontendMetrics
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .repetition import REPETITION_DETECTED, RepetitionDetectionParams, RepetitionDetector
from .sampling_params import RequestOutputKind
from .stop_strings import StopStrings

_DELTA = RequestOutputKind.DELTA
_FINAL_ONLY = RequestOutputKind.FINAL_ONLY


def wake(waiter: asyncio.Future[None]) -> None:
    """Whoever waits on a loop that was closed is gone."""
    if not waiter.done() and not waiter.get_loop().is_closed():
        waiter.set_result(None)


class Completion:
    """One of a request's n generations."""

    __slots__ = (
        "_all_text",
        "_all_tokens",
        "_decoder",
        "_fresh",
        "_has_news",
        "_hides_last",
        "_num_unchecked",
        "_repetition",
        "_sent_length",
        "_stops",
        "_text",
        "finish_reason",
        "generated",
        "has_started",
        "index",
        "last_token_at",
        "logprobs",
        "request",
        "stop_reason",
        "strikes",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        decoder: Decoder | None,
        stops: StopStrings | None,
        repetition: RepetitionDetectionParams | None,
        min_tokens: int,
        logprobs: LogprobView | None,
    ) -> None:
        self.request = request
        self.index = index
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.has_started = False
        """It has left the queue of some core."""
        self.generated = array("i")
        """All tokens, for a core that has to go on with it."""
        self.strikes = 0
        """Cores that died, one after the other, before it got further; see `replay`."""
        self._sent_length = -1
        self.last_token_at = 0.0
        self.logprobs = logprobs
        """Is told of each token's before the token."""
        self._decoder = decoder
        self._stops = stops
        self._repetition = None if repetition is None else RepetitionDetector(repetition, min_tokens)
        self._num_unchecked = min_tokens
        """Coming tokens whose text must not end the request."""
        self._fresh: list[int] = []
        """Tokens that the reader has not seen; without stop strings their text is not made yet."""
        self._text = ""
        """With stop strings: the text of `_fresh` that can be shown."""
        self._hides_last = False
        """The last token ended the request and has no text."""
        self._has_news = False
        self._all_tokens: list[int] = []
        self._all_text = ""

    def add(self, token: int, now: float) -> bool:
        """Note a token that came at `now`; True when it ends the completion: its text completes a stop
        string, or it completes a repetition."""
        self.generated.append(token)
        self._fresh.append(token)
        self._has_news = True
        self._clock(now)
        if self._stops is not None and self._watch(self._stops, token):
            return True
        if self._repetition is not None and self._repetition.push(token):
            self.finish(FinishReason.REPETITION, REPETITION_DETECTED)
            return True
        request = self.request
        if request.shows_progress:
            request.announce()
        return False

    def finish(self, reason: FinishReason, stop_reason: int | str | None, hides_last: bool = False) -> None:
        """Nothing follows. `hides_last`: the last token, just added or about to be, has no text."""
        self.finish_reason = str(reason)
        self.stop_reason = stop_reason
        self._hides_last = hides_last
        self._has_news = True
        request = self.request
        request.metrics.completed(self.finish_reason)
        request.num_unfinished -= 1
        if self.index == 0:  # the one that brings the prompt's logprobs
            request.show_progress()
        if request.shows_progress or request.num_unfinished == 0:
            request.announce()

    def add_last(self, token: int, now: float, finished: Finished, hides_last: bool) -> None:
        """Note the token that ended the completion, and the end."""
        self._repetition = None  # it is at its end anyway
        if hides_last and self._stops is not None:
            self.generated.append(token)
            self._fresh.append(token)  # its text is not to be watched, nor shown
            self._clock(now)
        elif self.add(token, now):
            return  # a stop string was complete first
        self.finish(finished.reason, finished.stop_token_id, hides_last)

    @property
    def number(self) -> int:
        """The wire's."""
        return self.request.first_number + self.index

    @property
    def num_tokens(self) -> int:
        return len(self.generated)

    @property
    def was_sent(self) -> bool:
        """The core knows it."""
        return self._sent_length >= 0

    @property
    def got_further(self) -> bool:
        """It has brought a token since it was sent."""
        return self.was_sent and self.num_tokens > self._sent_length

    def mark_sent(self) -> None:
        self._sent_length = self.num_tokens

    def mark_lost(self) -> None:
        """The core that knew it is gone."""
        self._sent_length = -1

    def _clock(self, now: float) -> None:
        before, self.last_token_at = self.last_token_at, now
        if before:
            self.request.metrics.gap(now - before)
        else:
            self.request.note_first_token(now)

    @property
    def has_news(self) -> bool:
        return self._has_news

    def take(self) -> CompletionOutput:
        """What the reader gets now."""
        self._has_news = False
        tokens, self._fresh = self._fresh, []
        text = self._take_text(tokens)
        if self.request.kind is not _DELTA:
            self._all_tokens += tokens
            self._all_text += text
            tokens, text = self._all_tokens.copy(), self._all_text
        view, logprobs, cumulative = self.logprobs, None, None
        if view is not None:
            logprobs = view.take_new() if self.request.kind is _DELTA else view.take_all()
            cumulative = view.cumulative
        return CompletionOutput(
            self.index,
            text,
            tokens,
            cumulative,
            logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _take_text(self, tokens: list[int]) -> str:
        decoder = self._decoder
        if decoder is None:
            return ""
        if self._stops is None:
            if self.finish_reason is None:
                return decoder.push(tokens)
            text = decoder.push(tokens[:-1] if self._hides_last else tokens)
            return text + decoder.finish()
        text, self._text = self._text, ""
        if self.finish_reason is not None and self._stops.found is None:
            text += self._stops.push(decoder.finish(), check=False) + self._stops.finish()
        return text

    def _watch(self, stops: StopStrings, token: int) -> bool:
        assert self._decoder is not None
        self._num_unchecked -= 1
        text = stops.push(self._decoder.push((token,)), check=self._num_unchecked < 0)
        self._text += text
        if stops.found is not None:
            self.finish(FinishReason.STOP, stops.found)
        return stops.found is not None


class Request:
    """The state of one request: its completions, and the reader that waits for them."""

    __slots__ = (
        "_arrival_time",
        "_error",
        "_first_token_at",
        "_max_tokens",
        "_num_prompt_logprobs",
        "_prompt_logprobs",
        "_queued_at",
        "_scheduled_at",
        "_waiter",
        "completions",
        "first_number",
        "has_output",
        "include_stop",
        "is_aborted",
        "is_claimed",
        "kind",
        "message",
        "metrics",
        "num_cached_tokens",
        "num_unfinished",
        "prompt",
        "prompt_token_ids",
        "request_id",
        "sent_at",
        "shows_progress",
    )

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        kind: RequestOutputKind,
        include_stop: bool,
        metrics: FrontendMetrics,
    ) -> None:
        self.metrics = metrics
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.kind = kind
        self.include_stop = include_stop
        self.first_number = -1
        """The wire's number of completion 0."""
        self.completions: list[Completion] = []
        self.num_unfinished = 1
        self.is_aborted = False
        self.is_claimed = False
        """A stream reads it."""
        self.has_output = False
        """`take` has something to give, or an error to raise."""
        self.shows_progress = False
        """There are outputs before the end; but the first one is to have the prompt's logprobs."""
        self.num_cached_tokens: int | None = None
        self.message: AddRequest | None = None
        """As it was sent for the first time."""
        self.sent_at = 0.0
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._arrival_time = time.time()
        self._queued_at = time.monotonic()
        self._scheduled_at = self._first_token_at = 0.0
        self._max_tokens: int | None = None
        self._prompt_logprobs: LogprobView | None = None
        self._num_prompt_logprobs = 1
        """Prompt tokens whose logprobs are noted, counting the first one, which has none."""

    def begin(
        self,
        decoders: Sequence[Decoder | None],
        stops: Sequence[StopStrings | None],
        min_tokens: int,
        max_tokens: int | None,
        repetition: RepetitionDetectionParams | None = None,
        logprobs: LogprobsAsked | None = None,
    ) -> None:
        """Make the completions, one for each decoder; the request is about to be sent."""
        views = [None] * len(decoders) if logprobs is None else logprobs.views(len(decoders))
        self._prompt_logprobs = None if logprobs is None else logprobs.prompt_view()
        self.completions = [
            Completion(self, index, decoder, watched, repetition, min_tokens, view)
            for index, (decoder, watched, view) in enumerate(zip(decoders, stops, views, strict=True))
        ]
        self.num_unfinished = len(self.completions)
        self._max_tokens = max_tokens
        if self._has_prompt_logprobs:
            self.show_progress()
        self.sent_at = time.monotonic()

    @property
    def ended(self) -> bool:
        return self.num_unfinished == 0 or self._error is not None

    @property
    def has_started(self) -> bool:
        """It has left the core's queue."""
        return self._scheduled_at > 0

    def start(self, num_cached_tokens: int, queued_seconds: float) -> None:
        """One of its completions left the core's queue; the first one tells the request's times."""
        self.num_cached_tokens = max(self.num_cached_tokens or 0, num_cached_tokens)
        self.metrics.started(len(self.prompt_token_ids), num_cached_tokens)
        if not self._scheduled_at:
            # The core tells how long, not when: its clock may be another machine's.
            self._scheduled_at = self.sent_at + queued_seconds

    def note_prompt_logprobs(self, rows: Mapping[int, WireRow]) -> None:
        """Some of the prompt's positions have come, perhaps not for the first time."""
        for position, row in rows.items():
            if position == self._num_prompt_logprobs and self._prompt_logprobs is not None:
                self._prompt_logprobs.note(row)
                self._num_prompt_logprobs += 1
        if self._has_prompt_logprobs:
            self.show_progress()

    @property
    def _has_prompt_logprobs(self) -> bool:
        """All that are wanted."""
        return self._prompt_logprobs is None or self._num_prompt_logprobs >= len(self.prompt_token_ids)

    def show_progress(self) -> None:
        """What comes from now on is shown as it comes."""
        self.shows_progress = self.kind is not _FINAL_ONLY

    def _take_prompt_logprobs(self) -> PromptLogprobs | None:
        """Once they are complete; with DELTA once."""
        view = self._prompt_logprobs
        if view is None or not self._has_prompt_logprobs:
            return None
        shown: PromptLogprobs
        if self.kind is not _DELTA:
            shown = view.take_all()
        else:
            self._prompt_logprobs = None
            shown = view.take_new()
        return shown

    def note_first_token(self, now: float) -> None:
        """A completion got its first token."""
        if not self._first_token_at:
            self._first_token_at = now
            self.metrics.first_token(now - self._queued_at)

    def report(self) -> None:
        """It was sent and is over, in whatever way: let the metrics know."""
        self.metrics.request_ended(
            num_prompt_tokens=len(self.prompt_token_ids),
            nums_generated=[part.num_tokens for part in self.completions],
            max_tokens=self._max_tokens,
            arrived=self._queued_at,
            scheduled=self._scheduled_at,
            first_token=self._first_token_at,
            last_token=self._last_token_at(),
            now=time.monotonic(),
        )

    def announce(self) -> None:
        """There is something to take: wake the reader."""
        self.has_output = True
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            wake(waiter)

    def fail(self, error: Exception) -> None:
        """End it with an error, which the reader gets."""
        self._error = error
        for part in self.completions:
            if part.finish_reason is None:
                self.metrics.completed(str(FinishReason.ERROR))
        self.announce()

    def abort(self) -> None:
        """End every completion that still runs; one that has not begun ends as soon as it does."""
        self.is_aborted = True
        for completion in self.completions:
            if completion.finish_reason is None:
                completion.finish(FinishReason.ABORT, None)

    def take(self) -> RequestOutput:
        """The reader's next output. Raises the error that ended the request."""
        if self._error is not None:
            raise self._error
        self.has_output = False
        parts = self.completions
        if self.kind is _DELTA and len(parts) > 1:
            outputs = [part.take() for part in parts if part.has_news]
        else:
            outputs = [part.take() for part in parts]
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            self._take_prompt_logprobs(),
            outputs,
            self.num_unfinished == 0,
            self._timings(),
            num_cached_tokens=self.num_cached_tokens,
        )

    def _timings(self) -> RequestMetrics:
        return RequestMetrics(
            sum(part.num_tokens for part in self.completions),
            self._arrival_time,
            self._queued_at,
            self._scheduled_at,
            self._first_token_at,
            self._last_token_at(),
        )

    def _last_token_at(self) -> float:
        return max((part.last_token_at for part in self.completions), default=0.0)

    async def wait(self) -> None:
        """Return when there is an output. One reader at a time."""
        while not self.has_output:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
