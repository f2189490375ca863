"""Requests that were added to be read later: kept until somebody does, but not without end."""

from __future__ import annotations

from ..ipc.errors import RequestError
from .requests import Request

MAX_ENDED = 10_000
"""Unread requests that have ended; of more, the first to be added are forgotten."""


class UnreadRequests:
    """By their ids. Those that have not ended are as many as the core takes."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}
        self._look_at = 2 * MAX_ENDED

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        """It takes the place of one of the same id, which has ended."""
        self._requests.pop(request.request_id, None)
        self._requests[request.request_id] = request
        if len(self._requests) >= self._look_at:  # seldom: a look at all costs little per request
            ended = [one.request_id for one in self._requests.values() if one.ended]
            for request_id in ended[:-MAX_ENDED]:
                del self._requests[request_id]
            self._look_at = len(self._requests) + MAX_ENDED

    def find(self, request_id: str) -> Request:
        """Raises RequestError when none is there."""
        request = self._requests.get(request_id)
        if request is None:
            raise _no_request(request_id)
        return request

    def claim(self, request: Request) -> Request:
        """The same request, for its only reader. Raises RequestError for a second one."""
        if request.is_claimed:
            raise _no_request(request.request_id)
        request.is_claimed = True
        if self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
        return request


def _no_request(request_id: str) -> RequestError:
    message = (
        f"no request {request_id!r} waits to be read: add_request makes one, and "
        "generate(prompt, sampling_params, request_id) does both"
    )
    return RequestError(message, parameter="request_id", value=request_id)
