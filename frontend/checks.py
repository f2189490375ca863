"""Checks of values that callers give: each returns the value in its plain form or raises RequestError."""

from __future__ import annotations

import math
import numbers

from ..ipc.errors import RequestError

INT32_MAX = 2**31 - 1


def refusal(name: str, value: object, limit: str) -> RequestError:
    """The error for a parameter that must be `limit`."""
    shown = f"{value!r:.200}"
    return RequestError(f"{name} must be {limit}, got {shown}", parameter=name, value=shown, limit=limit)


def real(name: str, value: object, limit: str) -> float:
    """A finite number as a float."""
    if type(value) is float and math.isfinite(value):  # what nearly all are; the rest costs ten times as much
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refusal(name, value, f"a number {limit}")
    try:
        plain = float(value)
    except OverflowError:
        plain = math.inf
    if not math.isfinite(plain):
        raise refusal(name, value, f"a number {limit}")
    return plain


def integer(name: str, value: object, low: int, high: int, limit: str) -> int:
    """An integer from `low` to `high`; True and False are none."""
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= int(value) <= high:
        raise refusal(name, value, limit)
    return int(value)


def texts(name: str, value: object, most: int, longest: int) -> list[str]:
    """A list of at most `most` strings of 1 to `longest` characters, from a list, a string or None."""
    values = [] if value is None else [value] if isinstance(value, str) else value
    if type(values) is list and not values:
        return []
    if not isinstance(values, (list, tuple)) or not all(isinstance(text, str) for text in values):
        raise refusal(name, value, "a string or a list of strings" if name == "stop" else "a list of strings")
    if "" in values:
        message = f"{name} cannot contain an empty string"
        raise RequestError(message, parameter=name, value=values, limit="strings of length >= 1")
    if len(values) > most:
        raise refusal(name, f"{len(values)} strings", f"at most {most} strings")
    if any(len(text) > longest for text in values):
        raise refusal(name, f"one of {max(map(len, values))}", f"strings of at most {longest} characters")
    if not all(map(is_unicode, values)):
        raise refusal(name, values, "text without lone surrogates")
    return list(values)


def is_unicode(text: str) -> bool:
    """Half of a surrogate pair can be neither tokenized nor sent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def token_ids(name: str, value: object, most: int) -> list[int]:
    """A list of at most `most` token ids, each once; the vocabulary is not known here."""
    if type(value) is list and not value:
        return []
    if not isinstance(value, (list, tuple)):
        raise refusal(name, value, "a list of token ids")
    if len(value) > most:
        raise refusal(name, f"{len(value)} token ids", f"at most {most} token ids")
    limit = "a list of token ids, integers in [0, 2**31)"
    return list(dict.fromkeys(integer(name, token, 0, INT32_MAX, limit) for token in value))
