"""An answer's parts: reasoning, content and tool calls, taken from text that arrives in pieces.

The same parser serves whole answers and streams, so both say the same. What may be the beginning of a mark is
held back until it is clear.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from .marks import split_before
from .tool_calls import CallDelta, CallParser, HermesCalls, JsonCalls
from .tool_use import HERMES, LLAMA, Form, ToolUse

THINK, END_THINK = "<think>", "</think>"


class Delta(NamedTuple):
    """What a piece of text brought."""

    reasoning: str
    content: str
    calls: list[CallDelta]

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class AnswerParser(Protocol):
    """One choice's."""

    @property
    def has_calls(self) -> bool:
        """The answer calls a function."""

    def push(self, text: str, is_last: bool) -> Delta:
        """What `text` completes; with `is_last` nothing is held back any more."""


class PlainAnswer:
    """Nothing but content."""

    has_calls = False

    def push(self, text: str, is_last: bool) -> Delta:
        return Delta("", text, [])


class ThinkSplitter:
    """Separates `<think>reasoning</think>` from what follows."""

    def __init__(self, begins_inside: bool) -> None:
        self._state = "inside" if begins_inside else "start"
        self._held = ""
        self._trims = begins_inside
        """The blank lines around a mark belong to neither side."""

    def push(self, text: str, is_last: bool) -> tuple[str, str]:
        """(reasoning, content)"""
        text = self._held + text
        self._held = ""
        reasoning = ""
        if self._state == "start":
            head = text.lstrip()
            if head.startswith(THINK):
                self._state, self._trims, text = "inside", True, head[len(THINK) :]
            elif THINK.startswith(head) and not is_last:
                self._held = text
                return "", ""
            else:
                self._state = "after"
        if self._state == "inside":
            text = self._trim(text)
            reasoning, mark, text = split_before(text, END_THINK)
            if not mark:
                if not is_last:
                    self._held, text = text, ""
                return (reasoning + text, "")
            self._state, self._trims = "after", True
        return reasoning, self._trim(text)

    def _trim(self, text: str) -> str:
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        return text


class Answer:
    """Reasoning first, if there is any, then content with tool calls in it."""

    def __init__(self, think: ThinkSplitter | None, calls: CallParser | None) -> None:
        self._think = think
        self._calls = calls

    @property
    def has_calls(self) -> bool:
        return self._calls is not None and self._calls.num_calls > 0

    def push(self, text: str, is_last: bool) -> Delta:
        reasoning = ""
        if self._think is not None:
            reasoning, text = self._think.push(text, is_last)
        if self._calls is None:
            return Delta(reasoning, text, [])
        content, calls = self._calls.push(text, is_last)
        return Delta(reasoning, content, calls)


class Parsers:
    """Makes the parser that fits the model and the request.

    Attributes:
        calls: "hermes", "llama3_json" or "none": calls are not looked for unless they are forced.
        thinks: the model separates its reasoning.
    """

    def __init__(self, calls: str, reasoning: str, chat_template: str | None) -> None:
        template = chat_template or ""
        if calls == "auto":
            # Hermes's is also what the server itself teaches models whose template shows no tools.
            hermes = "<tool_call>" in template or "tools" not in template
            calls = "hermes" if hermes else "llama3_json"
        self.calls = calls
        self.thinks = reasoning == "think" or (reasoning == "auto" and THINK in template)

    @property
    def form(self) -> Form:
        return LLAMA if self.calls == "llama3_json" else HERMES

    def answer(self, prompt: str, use: ToolUse, is_constrained: bool) -> AnswerParser:
        """For an answer to `prompt`; one that `is_constrained` from its first token has no reasoning."""
        begins_inside = prompt.rstrip().endswith(THINK)
        think = ThinkSplitter(begins_inside) if self.thinks and not is_constrained else None
        calls: CallParser | None = None
        if use.tools and (use.must_call or self.calls != "none"):
            kind = HermesCalls if self.form is HERMES else JsonCalls
            calls = kind(use.names, use.limit)
        return PlainAnswer() if think is None and calls is None else Answer(think, calls)
