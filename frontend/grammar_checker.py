"""The process that turns constraints into grammars and tries them: `grammars.py` starts it, and may kill it.

Here alone is what a caller wrote parsed. A grammar that passes has been built with the model's vocabulary,
under the limits that hold in the workers, and allows some first token.
"""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llguidance
import msgspec
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from ..ipc import grammars
from ..ipc.errors import RequestError
from ..ipc.grammar_messages import CheckedGrammar, CheckerReady, CheckGrammar, FromChecker, GrammarKind
from ..ipc.messages import MAX_GRAMMAR
from ..ipc.payloads import CheckerStart
from ..ipc.pipe import Pipe, PipeClosedError
from .json_schemas import prepared
from .structural_tags import grammar_of_tags

_BUILD_SECONDS = 0.25
"""Of computing: so long may an engine's step have to wait for it."""
_MEMORY = 2 << 30
"""Bytes of address space beyond what the vocabulary takes."""


def run(payload: bytes) -> None:
    """The process's entry; `payload` is a `CheckerStart`. Ends when the other side hangs up."""
    start = msgspec.json.decode(payload, type=CheckerStart)
    pipe: Pipe[FromChecker, CheckGrammar] = Pipe(socket.socket(fileno=start.fd), CheckGrammar)
    try:
        try:
            vocabulary = grammars.read_vocabulary(start.config)
        except ValueError as error:
            pipe.send(CheckerReady(str(error)))
            return
        _limit_memory()
        pipe.send(CheckerReady())
        while True:
            message = pipe.recv()
            assert message is not None
            pipe.send(check(vocabulary, message))
    except PipeClosedError:
        return


def check(vocabulary: llguidance.LLTokenizer, asked: CheckGrammar) -> CheckedGrammar:
    """The grammar, or what is wrong with it."""
    try:
        grammar = _GRAMMARS[asked.kind](vocabulary, asked)
        if len(grammar) > MAX_GRAMMAR:
            raise ValueError(f"the grammar has {len(grammar)} characters; at most {MAX_GRAMMAR}")
        _try(vocabulary, grammar)
    except RequestError as error:
        return CheckedGrammar(error=str(error).removeprefix("structured_outputs: "))
    except RecursionError:
        return CheckedGrammar(error="it is nested too deeply")
    except (ValueError, KeyError, TypeError) as error:
        return CheckedGrammar(error=str(error))
    return CheckedGrammar(grammar)


def _try(vocabulary: llguidance.LLTokenizer, grammar: str) -> None:
    """Take the first step, which is the dearest. Raises RequestError."""
    start = time.thread_time()
    matcher = grammars.new_matcher(vocabulary, grammar)
    mask = np.zeros(-(-vocabulary.vocab_size // 32), np.int32)
    grammars.fill_mask(matcher, mask)
    (allowed,) = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()
    if not len(allowed):
        raise ValueError("no text matches it")
    matcher.consume_token(int(allowed[0]))
    grammars.check(matcher)
    if time.thread_time() - start > _BUILD_SECONDS:
        raise ValueError(f"it is too large: it takes longer than {_BUILD_SECONDS:g} s to build")


def _json(vocabulary: llguidance.LLTokenizer, asked: CheckGrammar) -> str:
    return json.dumps({"grammars": [{"json_schema": prepared(json.loads(asked.text), asked)}]})


def _regex(vocabulary: llguidance.LLTokenizer, asked: CheckGrammar) -> str:
    return llguidance.LLMatcher.grammar_from_regex(asked.text)


def _choice(vocabulary: llguidance.LLTokenizer, asked: CheckGrammar) -> str:
    # One terminal: as a rule every choice would be an item of its own in the parser.
    choices = " | ".join(json.dumps(text) for text in json.loads(asked.text))
    return llguidance.LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}\n")


def _grammar(vocabulary: llguidance.LLTokenizer, asked: CheckGrammar) -> str:
    try:
        lark = any_to_lark(asked.text)
    except Exception as error:  # its own class, and bare Exception
        raise ValueError(f"not EBNF with a rule root, nor Lark with a rule start: {error}") from error
    return llguidance.LLMatcher.grammar_from_lark(lark)


def _structural_tag(vocabulary: llguidance.LLTokenizer, asked: CheckGrammar) -> str:
    def schema_text(schema: Any) -> str:
        return json.dumps(prepared(schema, asked))

    tag = json.loads(asked.text)
    if not isinstance(tag, dict):
        raise ValueError(f"a structural tag is a JSON object, got {asked.text:.100}")
    return grammar_of_tags(vocabulary, tag, schema_text)


_GRAMMARS: dict[GrammarKind, Callable[[llguidance.LLTokenizer, CheckGrammar], str]] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}


def _limit_memory() -> None:
    """What needs more than this is no grammar to serve: the process ends, and the request with it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
