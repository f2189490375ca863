"""The errors a caller can meet, and their form on the wire.

Two families: `RequestError` and `ConfigError` are the caller's to mend (they name the parameter, the value
and the limit), `OverloadedError` by trying again; `EngineDeadError` is ours.
"""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

import msgspec

ErrorKind: TypeAlias = Literal["request", "config", "dead", "overloaded", "crashed", "draining"]


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose."""

    code: ClassVar[str] = "dead"
    """The kind of error in a word, for programs: it stays the same when messages change."""


class RefusedError(HeadraceError, ValueError):
    """Something the caller asked for cannot be done; nothing else is disturbed.

    Attributes:
        parameter: the name of the parameter at fault, or None when none is.
        value: the value that was refused, as text.
        limit: what would have been accepted, as text.
    """

    code: ClassVar[ErrorKind]

    def __init__(
        self,
        message: str,
        *,
        parameter: str | None = None,
        value: object = None,
        limit: object = None,
    ) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = None if value is None else str(value)
        self.limit = None if limit is None else str(limit)


class RequestError(RefusedError):
    """One request cannot be served as asked."""

    code: ClassVar[ErrorKind] = "request"


class OverloadedError(RequestError):
    """There is no room for the request now: a queue is full, or the engine takes no more requests.

    Attributes:
        retry_after: seconds after which it is worth trying again.
    """

    code: ClassVar[ErrorKind] = "overloaded"

    def __init__(
        self,
        message: str,
        *,
        retry_after: float,
        parameter: str | None = None,
        value: object = None,
        limit: object = None,
    ) -> None:
        super().__init__(message, parameter=parameter, value=value, limit=limit)
        self.retry_after = retry_after


class DrainingError(OverloadedError):
    """The engine is about to end and takes no more requests; another one may come in its place."""

    code = "draining"


class RequestCrashedError(RequestError):
    """The engine crashed each time when it computed this request, and will not try again."""

    code = "crashed"


class ConfigError(RefusedError):
    """The engine cannot be built as asked: an argument, a model's files, or the memory they need."""

    code = "config"


class EngineDeadError(HeadraceError, RuntimeError):
    """The engine core or a worker is gone; the message holds the first cause."""


class EngineUnhealthyError(HeadraceError, RuntimeError):
    """The engine makes no progress at present, but it recovers: requests wait. `check_health` says it."""

    code = "unhealthy"


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """An error on the wire."""

    kind: ErrorKind
    message: str
    parameter: str | None = None
    value: str | None = None
    limit: str | None = None
    retry_after: float | None = None
    """Seconds; of "overloaded" and "draining" ones."""

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        """Describe `error`; anything that is not a `RefusedError` counts as the engine's own."""
        if not isinstance(error, RefusedError):
            return cls("dead", str(error) if isinstance(error, HeadraceError) else _cause(error))
        retry_after = error.retry_after if isinstance(error, OverloadedError) else None
        return cls(error.code, str(error), error.parameter, error.value, error.limit, retry_after)

    def exception(self) -> HeadraceError:
        """The exception that this describes, ready to raise."""
        if self.kind == "dead":
            return EngineDeadError(self.message)
        if self.kind in ("overloaded", "draining"):
            family = DrainingError if self.kind == "draining" else OverloadedError
            return family(
                self.message,
                retry_after=self.retry_after or 0.0,
                parameter=self.parameter,
                value=self.value,
                limit=self.limit,
            )
        families = {"request": RequestError, "config": ConfigError, "crashed": RequestCrashedError}
        return families[self.kind](self.message, parameter=self.parameter, value=self.value, limit=self.limit)


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
