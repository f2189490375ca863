"""RequestStream: the reader's end of one request, an asynchronous iterator that ends exactly once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType

from .outputs import RequestOutput
from .requests import Request


class RequestStream:
    """The reader's end of one request: `async for output in stream`.

    Ends after the output that has `finished`, or with the request's error. Cancelling a task that waits for
    it, `aclose()`, leaving `async with`, or dropping the last reference aborts the request. `start` is called
    at the first iteration; before that there is nothing to abort.
    """

    def __init__(
        self,
        request_id: str,
        start: Callable[[], Awaitable[Request]],
        abort: Callable[[Request], None],
        abort_soon: Callable[[Request], None],
    ) -> None:
        """`abort` ends a request at once; `abort_soon` may be called from anywhere at any moment."""
        self.request_id = request_id
        self._start = start
        self._request: Request | None = None
        self._abort = abort
        self._abort_soon = abort_soon
        self._done = False
        self._is_reading = False

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        if self._is_reading:
            raise RuntimeError(f"request {self.request_id!r} already has a reader")
        self._is_reading = True
        try:
            request = self._request
            if request is None:
                request = self._request = await self._start()
                if self._done:  # it was left meanwhile
                    self._abort(request)
            if not request.has_output:
                await request.wait()
            output = request.take()
        except GeneratorExit:  # the collector has found the reader's task, which nothing will wake any more
            self._drop()
            raise
        except BaseException:
            self.abort()
            raise
        finally:
            self._is_reading = False
        self._done = output.finished
        return output

    async def aclose(self) -> None:
        """Abort the request if it still runs; idempotent."""
        self.abort()

    def abort(self) -> None:
        """The same, for callers that cannot await."""
        if not self._done:
            self._done = True
            if self._request is not None and not self._request.ended:
                self._abort(self._request)

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def __del__(self) -> None:
        self._drop()

    def _drop(self) -> None:
        """The collector may strike in any thread and in the middle of anything."""
        if not self._done:
            self._done = True
            if self._request is not None and not self._request.ended:
                self._abort_soon(self._request)
