"""Tool calls in a model's text, as it arrives: the forms of Hermes and Qwen, and of Llama 3.

A call's name comes out when it is known, its arguments as they are written. Only functions that were offered
count; everything else that looks like a call stays text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from .marks import split_before

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_HEADER = re.compile(
    r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL
)
_MAX_HEADER = 1024
"""Characters; a call that has not named its function by then is read when it is whole."""
_SPACE = " \t\r\n"


class CallDelta(NamedTuple):
    """News of one call: its id and name once, then pieces of its arguments."""

    number: int
    id: str | None
    name: str | None
    arguments: str


class CallParser(Protocol):
    num_calls: int

    def push(self, text: str, is_last: bool) -> tuple[str, list[CallDelta]]:
        """(content, news of calls)"""


class _ObjectEnd:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str, start: int) -> int:
        """The index after the object's end, or -1. Call it with what follows what it has seen."""
        for at in range(start, len(text)):
            character = text[at]
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return -1


class _Call:
    """One `{"name": ..., "arguments": {...}}`, read as it arrives."""

    def __init__(self, tools: Sequence[str], number: int) -> None:
        self.text = ""
        """All of it so far, to be given back when it is no call."""
        self.named = False
        """The client has heard of it: it is a call for good."""
        self._tools = tools
        self._number = number
        self._end = _ObjectEnd()
        self._arguments_end = _ObjectEnd()
        self._sent = 0
        """Where the arguments not yet given out begin."""
        self._arguments_done = False

    def push(self, text: str) -> tuple[list[CallDelta], str | None]:
        """(news, what follows the object, None while it goes on)"""
        known = len(self.text)
        self.text += text
        end = self._end.find(self.text, known)
        rest = None
        if end >= 0:
            self.text, rest = self.text[:end], self.text[end:]
        deltas: list[CallDelta] = []
        if not self.named and known < _MAX_HEADER and (header := _HEADER.match(self.text)):
            deltas += self._begin(_name(header[1]), header.end())
        if self.named:
            deltas += self._arguments()
        elif rest is not None:
            deltas += self._whole()
        return deltas, rest

    def _begin(self, name: str | None, start: int) -> list[CallDelta]:
        if name not in self._tools:
            return []
        self.named = True
        self._sent = start
        return [CallDelta(self._number, f"call_{secrets.token_hex(12)}", name, "")]

    def _arguments(self) -> list[CallDelta]:
        if self._arguments_done:
            return []
        end = self._arguments_end.find(self.text, self._sent)
        self._arguments_done = end >= 0
        piece = self.text[self._sent : end if end >= 0 else None]
        self._sent += len(piece)
        return [CallDelta(self._number, None, None, piece)] if piece else []

    def _whole(self) -> list[CallDelta]:
        """The object is complete, and its keys were not in the usual order."""
        try:
            call = msgspec.json.decode(self.text, type=dict[str, object])
        except msgspec.DecodeError:
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        written = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
        self._arguments_done = True
        begun = self._begin(str(call.get("name")), 0)
        return [begun[0]._replace(arguments=written)] if begun else []


class _Calls:
    """What the forms have in common: counting calls, and reading the one that is being written."""

    def __init__(self, tools: Sequence[str], limit: int | None) -> None:
        self.num_calls = 0
        self._tools = tools
        self._limit = limit
        self._call: _Call | None = None
        self._held = ""

    def _read(self, text: str, deltas: list[CallDelta]) -> tuple[str, str | None]:
        """Read on in the present call: (its text if it was none after all, what follows it or None)."""
        if self._call is None:
            self._call = _Call(self._tools, self.num_calls)
        call = self._call
        news, rest = call.push(text)
        if news and news[0].name is not None:
            self.num_calls += 1
        deltas += [delta for delta in news if self._limit is None or delta.number < self._limit]
        return ("", None) if rest is None else (self._end_call(), rest)

    def _end_call(self) -> str:
        """Done with the present call; returns its text if it was none."""
        call, self._call = self._call, None
        return "" if call is None or call.named else call.text


class HermesCalls(_Calls):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them, text around them."""

    def __init__(self, tools: Sequence[str], limit: int | None) -> None:
        super().__init__(tools, limit)
        self._state = "outside"
        self._trims = False
        """Blanks after a call are not content either."""

    def push(self, text: str, is_last: bool) -> tuple[str, list[CallDelta]]:
        text, self._held = self._held + text, ""
        content = ""
        deltas: list[CallDelta] = []
        while text:
            if self._state == "outside":
                shown, text = self._outside(text)
                content += shown
            elif self._state == "inside":
                failed, rest = self._read(text, deltas)
                if rest is not None:
                    self._state = "outside" if failed else "closing"
                content += _OPEN + failed if failed else ""
                text = rest or ""
            else:
                text = self._closing(text)
        if is_last and self._state == "inside" and not (self._call and self._call.named):
            content += _OPEN + self._end_call()
        elif is_last and self._state == "outside":
            content += self._held
        return content, deltas

    def _outside(self, text: str) -> tuple[str, str]:
        """(content, what is still to be read)"""
        if self._trims:
            text = text.lstrip(_SPACE)
            self._trims = not text
        before, mark, after = split_before(text, _OPEN)
        shown = before.rstrip(_SPACE)  # blanks before a call are not content
        if mark:
            self._state = "inside"
            return shown, after
        self._held = text[len(shown) :]
        return shown, ""

    def _closing(self, text: str) -> str:
        """Skip the closing mark, which a model may also forget."""
        body = text.lstrip(_SPACE)
        if _CLOSE.startswith(body) and body != _CLOSE:
            self._held = text
            return ""
        self._state, self._trims = "outside", True
        return body.removeprefix(_CLOSE)


class JsonCalls(_Calls):
    """Llama 3's form: the answer is one or several objects with a name and parameters, and nothing else."""

    _BETWEEN = _SPACE + "[],;"
    """Some write several as an array."""

    def __init__(self, tools: Sequence[str], limit: int | None) -> None:
        super().__init__(tools, limit)
        self._is_text = False
        self._skipped = ""
        """What stood before the object being read."""

    def push(self, text: str, is_last: bool) -> tuple[str, list[CallDelta]]:
        text, self._held = self._held + text, ""
        deltas: list[CallDelta] = []
        while text and not self._is_text:
            if self._call is None:
                body = text.lstrip(self._BETWEEN).removeprefix(_PYTHON_TAG).lstrip(self._BETWEEN)
                if _PYTHON_TAG.startswith(body):  # also when there is nothing yet
                    self._held, text = text, ""
                    break
                self._skipped, text = text[: len(text) - len(body)], body
                if not body.startswith("{"):
                    self._is_text = True
                    text = self._skipped + text
                    break
            failed, rest = self._read(text, deltas)
            text = rest or ""
            if failed:
                self._is_text = True
                text = self._skipped + failed + text
        if is_last and not self._is_text:
            failed = self._end_call()
            text = self._skipped + failed if failed else "" if self.num_calls else self._held
        return text, deltas


def _name(literal: str) -> str | None:
    """The string that a JSON literal (without its quotes) stands for."""
    try:
        return msgspec.json.decode(f'"{literal}"', type=str)
    except msgspec.DecodeError:
        return None
