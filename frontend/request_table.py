"""RequestTable: which of a client's requests the core works on, and what each step brings them. Pure."""

from __future__ import annotations

import asyncio
import time

from ..ipc.errors import RequestCrashedError
from ..ipc.messages import AddRequest, Finished, FinishReason, StepOutputs, unpack
from .logprobs import rows_of
from .metrics import FrontendMetrics
from .replay import ReplayQueue, replay
from .requests import Completion, Request, wake


class RequestTable:
    """All requests of one client that the core works on, by the wire's numbers and by their ids."""

    def __init__(self) -> None:
        self._completions: dict[int, Completion] = {}
        self._requests: dict[str, Request] = {}
        self._next_number = 0
        self.metrics = FrontendMetrics()
        self._empty: asyncio.Future[None] | None = None
        self._replays = ReplayQueue()

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def ids(self) -> list[str]:
        return list(self._requests)

    def get(self, request_id: str) -> Request | None:
        return self._requests.get(request_id)

    async def wait_until_empty(self) -> None:
        loop = asyncio.get_running_loop()
        while self._requests:
            if self._empty is None or self._empty.get_loop() is not loop:
                self._empty = loop.create_future()
            await asyncio.shield(self._empty)

    def reserve(self, request: Request) -> None:
        """Take its id: until it ends, no other request may have it."""
        self._requests[request.request_id] = request

    def number(self, request: Request) -> int:
        """Number its completions for the wire; returns the first number."""
        count = len(request.completions)
        if self._next_number + count > 2**31 - 1:  # the wire's columns are int32
            self._next_number = 0
        first = self._next_number
        self._next_number += count
        request.first_number = first
        for index, completion in enumerate(request.completions):
            self._completions[first + index] = completion
        return first

    def hand_over(self, request: Request, message: AddRequest, *, is_sent: bool) -> None:
        """The core has been told of it by `message`; or, there being none, the next one is to be told."""
        request.message = message
        for completion in request.completions:
            if is_sent:
                completion.mark_sent()
            else:
                self._replays.hold(completion)

    def lose_core(self, max_replays: int, *, beyond_doubt: bool) -> None:
        """The core is gone with everything: `replays` are for the next one.

        `beyond_doubt`: if a request was the cause, it is one of ours.
        """
        for completion in self._replays.refill(self._completions.values(), max_replays, beyond_doubt):
            request = completion.request
            if not request.ended:
                self.drop(request)
                request.fail(RequestCrashedError("the engine core died each time when it had this request"))

    def lose_connection(self) -> None:
        """The core has forgotten everything, and lives: `replays` are for the same one."""
        self._replays.send_again(self._completions.values())

    @property
    def owes_replays(self) -> bool:
        """`replays` may have something to say."""
        return not self._replays.is_empty

    @property
    def has_suspects(self) -> bool:
        """Cores may have died of some of its requests: these need their turn."""
        return self._replays.has_suspects

    def replays(self, *, may_try: bool) -> list[AddRequest]:
        """What to tell the core now of the requests that another one had; of suspects only with `may_try`."""
        now, due = time.monotonic(), self._replays.due(may_try=may_try)
        return [replay(each, now) for each in due if self._completions.get(each.number) is each]

    def drop(self, request: Request) -> list[int]:
        """Forget it; returns the numbers of its completions that the core still works on."""
        self._forget(request)
        first = request.first_number
        numbers = range(first, first + len(request.completions)) if first >= 0 else ()
        return [number for number in numbers if self._completions.pop(number, None) is not None]

    def fail_all(self, error: Exception) -> None:
        """End every request with an error of this type and text."""
        requests = list(self._requests.values())
        self._requests.clear()
        self._completions.clear()
        self._tell_if_empty()
        for request in requests:
            request.fail(type(error)(str(error)))  # its own: each raise adds to an error's traceback
            _report(request)

    def apply(self, message: StepOutputs) -> list[int]:
        """Note what one step brought. Returns numbers that the core is to abort: stop strings ended them."""
        completions = self._completions
        self.metrics.generated(len(message.tokens) // 4)
        for started in message.started:
            completion = completions.get(started.request)
            if completion is not None and not completion.has_started:  # or else it is a replay
                completion.has_started = True
                completion.request.start(started.num_cached_tokens, started.queued_seconds)
        if message.logprobs is not None or message.prompt_logprobs:
            self._note_logprobs(message)
        if message.finished:
            return self._apply_with_ends(message)
        stopped: list[int] = []
        now = time.monotonic()
        for number, token in zip(unpack(message.requests), unpack(message.tokens), strict=True):
            completion = completions.get(number)
            if completion is not None and completion.add(token, now):
                stopped.append(number)
                self._ended(number)
        return stopped

    def _note_logprobs(self, message: StepOutputs) -> None:
        for prompt in message.prompt_logprobs:
            if (completion := self._completions.get(prompt.request)) is not None:
                completion.request.note_prompt_logprobs(rows_of(prompt.logprobs))
        if message.logprobs is None:
            return
        numbers = unpack(message.requests)
        for place, row in rows_of(message.logprobs).items():
            completion = self._completions.get(numbers[place])
            if completion is not None and completion.logprobs is not None:
                completion.logprobs.note(row)

    def _apply_with_ends(self, message: StepOutputs) -> list[int]:
        ends = {finished.request: finished for finished in message.finished}
        numbers, tokens = unpack(message.requests), unpack(message.tokens)
        last = {number: i for i, number in enumerate(numbers) if number in ends}
        stopped: list[int] = []
        now = time.monotonic()
        for i, (number, token) in enumerate(zip(numbers, tokens, strict=True)):
            completion = self._completions.get(number)
            if completion is None:
                continue
            if last.get(number) == i:
                finished = ends[number]
                completion.add_last(token, now, finished, _hides_last(completion, finished))
                self._ended(number)
            elif completion.add(token, now):
                stopped.append(number)
                self._ended(number)
        for number, finished in ends.items():
            if (completion := self._completions.get(number)) is not None:
                stopped += self._end_without_token(number, completion, finished)
        return [number for number in stopped if number not in ends]

    def _end_without_token(self, number: int, completion: Completion, finished: Finished) -> list[int]:
        if finished.error is not None:
            request = completion.request
            others = self.drop(request)
            request.fail(finished.error.exception())
            return others
        completion.finish(finished.reason, finished.stop_token_id)
        self._ended(number)
        return []

    def _ended(self, number: int) -> None:
        request = self._completions.pop(number).request
        if request.ended:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        if self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
            _report(request)
        self._tell_if_empty()

    def _tell_if_empty(self) -> None:
        if not self._requests and self._empty is not None:
            waiter, self._empty = self._empty, None
            wake(waiter)


def _report(request: Request) -> None:
    if request.first_number >= 0:
        request.report()


def _hides_last(completion: Completion, finished: Finished) -> bool:
    """The token that stopped a request has text only with `include_stop_str_in_output`."""
    return finished.reason is FinishReason.STOP and not completion.request.include_stop
