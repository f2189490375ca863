"""RequestTimeouts: how long a request may take."""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import TypeGuard

from ..ipc.errors import RequestError

_LIMIT = "a number of seconds, 0 .. 1e9"


@dataclass(frozen=True)
class RequestTimeouts:
    """Seconds from the call that starts a request; None is any time.

    A request that misses one ends with finish_reason "timeout" and what it had generated.
    """

    queue: float | None = None
    """Until it leaves the queue for the first time."""
    first_token: float | None = None
    total: float | None = None
    """Until it has ended. `timeout=30` says the same as `timeout=RequestTimeouts(total=30)`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not _is_seconds(value):
                name = f"timeout.{field.name}"
                message = f"{name} must be {_LIMIT}, or None, got {value!r:.100}"
                raise RequestError(message, parameter=name, value=f"{value!s:.100}", limit=_LIMIT)

    def after(self, seconds: float) -> RequestTimeouts:
        """What is left of them."""
        if self == _ANY_TIME:
            return self
        given = (self.queue, self.first_token, self.total)
        return RequestTimeouts(
            *(None if value is None else max(0.0, float(value) - seconds) for value in given)
        )


_ANY_TIME = RequestTimeouts()


def checked_timeouts(timeout: object) -> RequestTimeouts:
    """`RequestTimeouts`, or a number for the total alone, or None. Raises RequestError."""
    if timeout is None:
        return _ANY_TIME
    if isinstance(timeout, RequestTimeouts):
        return timeout
    if not _is_seconds(timeout):
        limit = f"{_LIMIT}, or a RequestTimeouts"
        message = f"timeout must be {limit}, got {timeout!r:.100}"
        raise RequestError(message, parameter="timeout", value=f"{timeout!s:.100}", limit=limit)
    return RequestTimeouts(total=timeout)


def _is_seconds(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return 0 <= float(value) <= 1e9  # NaN is not
    except OverflowError:
        return False
