"""StructuredOutputsParams: what a request's text must look like. Names and rules are vLLM's.

Says what is asked for; `grammars.py` has it turned into a grammar. Parses nothing that the caller wrote: that
is done where it may take long.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import msgspec

from ..ipc.config import StructuredOutputsConfig
from ..ipc.errors import RequestError
from ..ipc.grammar_messages import CheckGrammar, GrammarKind
from .names import nearest

MAX_TEXT = 1 << 18
"""Characters of a schema, an expression, a grammar or a structural tag, and of all choices together."""
MAX_CHOICES = 10_000

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_ANY_OBJECT = '{"type":"object"}'


@dataclass
class StructuredOutputsParams:
    """Exactly one constraint, and how JSON is written.

    Raises RequestError, a ValueError, for none, for several, and for one of the wrong type or size. Whether
    it can be matched is only known when the request is made.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema."""
    regex: str | None = None
    """What the whole text must match, in the syntax of Rust's `regex`."""
    choice: list[str] | None = None
    """The texts of which it must be one."""
    grammar: str | None = None
    """A context-free grammar: EBNF as llama.cpp's GBNF writes it (rule `root`), or Lark (rule `start`)."""
    json_object: bool | None = None
    """True: any JSON object."""
    structural_tag: str | dict[str, Any] | None = None
    """Free text in which certain triggers begin a tag whose content has a schema."""
    disable_any_whitespace: bool = False
    """JSON without whitespace between its tokens."""
    disable_additional_properties: bool = False
    """JSON objects without properties that their schema does not name."""
    whitespace_pattern: str | None = None
    """A regular expression: the whitespace between JSON's tokens."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StructuredOutputsParams:
        for name in kwargs:
            if name not in _FIELDS:
                message = f"StructuredOutputsParams has no parameter {name!r}{nearest(name, _FIELDS)}"
                raise RequestError(message, parameter=name, value=kwargs[name])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.to_check(StructuredOutputsConfig())

    def to_check(self, defaults: StructuredOutputsConfig) -> CheckGrammar:
        """Check every field; what is asked for, ready to be made a grammar."""
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise _refusal(name, getattr(self, name), "True or False")
        if self.json_object is not None and self.json_object is not True:
            raise _refusal("json_object", self.json_object, "True, or None")
        pattern = self.whitespace_pattern
        if pattern is not None:
            _check_text("whitespace_pattern", pattern)
            if self.disable_any_whitespace:
                message = "whitespace_pattern and disable_any_whitespace exclude each other"
                raise RequestError(message, parameter="whitespace_pattern", value=pattern)
        kind, text = self._constraint()
        tight = self.disable_any_whitespace or (defaults.disable_any_whitespace and pattern is None)
        closed = self.disable_additional_properties or defaults.disable_additional_properties
        return CheckGrammar(kind, text, not tight, not closed, pattern)

    def _constraint(self) -> tuple[GrammarKind, str]:
        """Its kind and its text."""
        kinds = [name for name in _KINDS if getattr(self, name) is not None]
        if len(kinds) != 1:
            limit = "exactly one of " + ", ".join(_KINDS)
            got = " and ".join(kinds) or "none"
            message = f"structured_outputs must have {limit}, got {got}"
            raise RequestError(message, parameter="structured_outputs", value=got, limit=limit)
        kind, asked = kinds[0], getattr(self, kinds[0])
        if kind == "json_object":
            return "json", _ANY_OBJECT
        if kind == "choice":
            _check_choice(asked)
            asked = _as_json(kind, list(asked))
        elif kind in ("json", "structural_tag") and isinstance(asked, dict):
            asked = _as_json(kind, asked)
        _check_text(kind, asked)
        return cast(GrammarKind, kind), asked


_FIELDS = {field.name for field in dataclasses.fields(StructuredOutputsParams)}


def _check_text(name: str, text: object) -> None:
    limit = f"a string of 1 to {MAX_TEXT} characters"
    if not isinstance(text, str) or not 1 <= len(text) <= MAX_TEXT:
        raise _refusal(name, text, limit)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _refusal(name, text, "text without lone surrogates") from error


def _check_choice(choice: object) -> None:
    if not isinstance(choice, (list, tuple)) or not all(isinstance(text, str) for text in choice):
        raise _refusal("choice", choice, "a list of strings")
    if not 1 <= len(choice) <= MAX_CHOICES:
        message = f"choice must have 1 to {MAX_CHOICES} strings, got {len(choice)}"
        raise RequestError(message, parameter="choice", value=len(choice), limit=MAX_CHOICES)


def _as_json(name: str, value: object) -> str:
    try:
        return msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        message = f"{name} cannot be written as JSON: {error}"
        raise RequestError(message, parameter=name, limit="JSON") from error


def _refusal(name: str, value: object, limit: str) -> RequestError:
    shown = f"{value!r:.100}"
    return RequestError(f"{name} must be {limit}, got {shown}", parameter=name, value=shown, limit=limit)
