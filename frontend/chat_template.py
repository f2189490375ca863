"""Chat templates: a conversation becomes one prompt, by the model's own Jinja template.

Templates are data from strangers: they run in Jinja's immutable sandbox. The names they may use are those
that Hugging Face's models rely on.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ..ipc.errors import RequestError

_MOST_COMPILED = 64
"""Templates that are kept: servers may be told to take them from requests."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    continue_final_message: bool = False,
    **variables: Any,
) -> str:
    """The prompt's text. `continue_final_message` ends it within the last message, for the model to go on.

    Raises RequestError: not a conversation, or the template refuses it.
    """
    check_messages(messages)
    try:
        text = _compiled(template).render(messages=messages, **variables)
    except Exception as error:  # a program's, with data that its author has not seen
        why = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        message = f"the chat template refused the messages: {why}"
        raise RequestError(message, parameter="messages") from error
    if not continue_final_message:
        return text
    return text[: _end_of_final(text, messages[-1].get("content"))]


def _end_of_final(text: str, content: object) -> int:
    """Where the last message's content ends in `text`; templates may have cut off what trails."""
    name, final = "continue_final_message", content if isinstance(content, str) else ""
    if not final.strip():
        limit = "a last message with text"
        raise RequestError(f"{name} needs {limit}, got {content!r:.100}", parameter=name, limit=limit)
    at = text.rfind(final.strip())
    if at < 0:
        limit = "a template that shows the last message"
        message = f"{name}: the chat template does not show the last message as it is"
        raise RequestError(message, parameter=name, value=True, limit=limit)
    shown = final.lstrip()
    return at + len(shown if text.startswith(shown, at) else final.strip())


def check_messages(messages: object) -> None:
    """Raises RequestError unless it is a list of {"role": ..., "content": ...}."""
    limit = 'a non-empty list of {"role": ..., "content": ...}'
    if isinstance(messages, (list, tuple)) and messages:
        wrong = [m for m in messages if not (isinstance(m, Mapping) and isinstance(m.get("role"), str))]
        if not wrong:
            return
    message = f"messages must be {limit}, got {messages!r:.200}"
    raise RequestError(message, parameter="messages", value=type(messages).__name__, limit=limit)


@cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(_MOST_COMPILED)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words, for training; here it only shows what is inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which models have not seen.
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
