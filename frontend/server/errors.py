"""Errors as OpenAI's clients expect them: a status code and {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ...ipc.errors import (
    DrainingError,
    EngineDeadError,
    OverloadedError,
    RefusedError,
    RequestCrashedError,
    RequestError,
)
from ..names import nearest

logger = logging.getLogger("headrace")

RETRY_SECONDS = 1
"""What a client is told to wait when the server cannot know better."""
CLIENT_GONE = 499
"""Nobody reads this status; it is what proxies log."""
_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_PATH = re.compile(r" - at (?:`key` in )?`\$([^`]*)`$")


class ApiError(Exception):
    """An answer other than 200; `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        content = msgspec.json.encode(self.body())
        return Response(content, self.status, self.headers, media_type="application/json")


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param)


def unavailable(message: str, seconds: float = RETRY_SECONDS, status: int = 503) -> ApiError:
    """An error that goes away: clients repeat the request after so many seconds."""
    return ApiError(status, message, headers={"retry-after": str(max(round(seconds), 1))})


def as_api_error(error: Exception, renamed: Mapping[str, str] | None = None) -> ApiError:
    """What to tell the client; a fault of our own is logged, and told without its details.

    `renamed`: names of parameters to the client's own for them.
    """
    match error:
        case ApiError():
            return error
        case DrainingError():
            return unavailable(str(error), error.retry_after)
        case OverloadedError():
            return unavailable(str(error), error.retry_after, 429)
        case RequestCrashedError():
            return ApiError(500, str(error))
        case RequestError():
            # The one limit of a prompt that is a number is its length. Clients know this code and shorten it.
            is_too_long = error.parameter == "prompt" and (error.limit or "").isdigit()
            code = "context_length_exceeded" if is_too_long else None
            name = error.parameter
            if name is None or renamed is None or name not in renamed:
                return ApiError(400, str(error), param=name, code=code)
            message = re.sub(rf"^{name}(?=[ :])", renamed[name], str(error))
            return ApiError(400, message, param=renamed[name], code=code)
        case EngineDeadError() | RefusedError():
            return unavailable(f"the engine cannot serve: {error}")
        case HTTPException():
            headers = dict(error.headers or {})
            return ApiError(error.status_code, error.detail, headers=headers)
        case ClientDisconnect():
            return ApiError(CLIENT_GONE, "the client closed the connection")
    logger.error("a fault of the server itself", exc_info=error)
    return ApiError(500, "internal server error")


def as_bad_body(error: msgspec.DecodeError | RecursionError, known: Mapping[str, object]) -> ApiError:
    """What is wrong with a request's body, from what msgspec says about it."""
    text = str(error)
    if isinstance(error, RecursionError):
        return bad_request("the body is nested too deeply")
    if not isinstance(error, msgspec.ValidationError):
        return bad_request(f"the body is not valid JSON: {text}")
    at = _PATH.search(text)
    text = _PATH.sub("", text)
    inside = at[1].lstrip(".") if at else ""
    if unknown := _UNKNOWN_FIELD.match(text):
        name = f"{inside}.{unknown[1]}" if inside else unknown[1]
        hint = "" if inside else nearest(unknown[1], known)
        return bad_request(f"unrecognized request argument supplied: {name}{hint}", name)
    if missing := _MISSING_FIELD.match(text):
        name = f"{inside}.{missing[1]}" if inside else missing[1]
        return bad_request(f"missing required argument: {name}", name)
    return bad_request(f"{inside or 'the body'}: {text}", inside or None)


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's form of an exception handler: no such route, or not with this method."""
    told = as_api_error(error)
    message = f"there is no {request.method} {request.url.path:.100}; GET /openapi.json tells what there is"
    return ApiError(told.status, message, headers=told.headers).response()
