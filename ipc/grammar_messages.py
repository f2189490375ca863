"""What a frontend and the process that checks grammars for it say to each other."""

from __future__ import annotations

from typing import Literal, TypeAlias

from .messages import Message

GrammarKind: TypeAlias = Literal["json", "regex", "choice", "grammar", "structural_tag"]


class CheckGrammar(Message, frozen=True):
    """Turn a constraint into a grammar and try it out."""

    kind: GrammarKind
    text: str
    """A JSON schema, a regular expression, a JSON list of strings, EBNF or Lark, a JSON structural tag."""
    any_whitespace: bool = True
    """Of JSON: whether there may be any between its tokens."""
    additional_properties: bool = True
    """Of JSON: False forbids those that a schema does not mention."""
    whitespace_pattern: str | None = None
    """Of JSON: what `any_whitespace` means, a regular expression."""


class CheckedGrammar(Message, frozen=True):
    """The answer to `CheckGrammar`."""

    grammar: str = ""
    """For `Sampling.grammar`."""
    error: str = ""
    """Why there is none."""


class CheckerReady(Message, frozen=True):
    """The vocabulary is read."""

    error: str = ""
    """Why no grammar can be matched with it."""


FromChecker: TypeAlias = CheckerReady | CheckedGrammar
