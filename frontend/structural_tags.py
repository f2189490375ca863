"""Structural tags as Lark: free text in which triggers begin tags whose content is constrained.

Both forms that vLLM takes: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, and xgrammar's
`{"type": "structural_tag", "format": {...}}`. Special tokens of the vocabulary may stand in any literal text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

Json = dict[str, Any]
_ANY = r"/(.|\n)*/"


def grammar_of_tags(vocabulary: llguidance.LLTokenizer, tag: Json, schema_text: Callable[[Any], str]) -> str:
    """The grammar of a structural tag; `schema_text` writes a JSON schema with the request's options.

    Raises ValueError or KeyError for what is not one.
    """
    writer = _Writer(vocabulary, schema_text)
    if "structures" in tag:
        _expect_keys(tag, {"structures", "triggers"}, {"type"})
        tags = [
            {"begin": each["begin"], "content": {"type": "json_schema", "json_schema": each["schema"]}}
            | {"end": each["end"]}
            for each in tag["structures"]
        ]
        start = writer.triggered_tags({"tags": tags, "triggers": tag["triggers"]})
    else:
        _expect_keys(tag, {"type", "format"}, set())
        start = writer.write(tag["format"])
    return writer.grammar(start)


class _Writer:
    """Rules of one Lark grammar, and the grammars that it refers to."""

    def __init__(self, vocabulary: llguidance.LLTokenizer, schema_text: Callable[[Any], str]) -> None:
        self._vocabulary = vocabulary
        self._schema_text = schema_text
        self._rules: list[str] = []
        self._others: list[dict[str, str]] = []

    def grammar(self, start: str) -> str:
        lark = "\n".join(["%llguidance {}", f"start: {start}", f"ANY: {_ANY}", *self._rules, ""])
        return json.dumps({"grammars": [{"lark_grammar": lark}, *self._others]})

    def write(self, form: Json) -> str:
        """A format as an expression."""
        kind = form["type"]
        if kind not in _FORMATS:
            raise ValueError(f"unknown structural tag format {kind!r}; known are {', '.join(_FORMATS)}")
        return _FORMATS[kind](self, form)

    def const_string(self, form: Json) -> str:
        _expect_keys(form, {"type", "value"}, set())
        return self._literal(form["value"])

    def json_schema(self, form: Json) -> str:
        _expect_keys(form, {"type", "json_schema"}, set())
        return f"%json {self._schema_text(form['json_schema'])}"

    def any_text(self, form: Json) -> str:
        _expect_keys(form, {"type"}, set())
        return "ANY"

    def regex(self, form: Json) -> str:
        _expect_keys(form, {"type", "pattern"}, set())
        return self._rule(f"/{llguidance.regex_to_lark(form['pattern'])}/")

    def ebnf(self, form: Json) -> str:
        _expect_keys(form, {"type", "grammar"}, set())
        return self._refer(any_to_lark(form["grammar"]))

    def sequence(self, form: Json) -> str:
        _expect_keys(form, {"type", "elements"}, set())
        return self._rule(" ".join(self.write(each) for each in form["elements"]))

    def either(self, form: Json) -> str:
        _expect_keys(form, {"type", "elements"}, set())
        return self._rule(" | ".join(self.write(each) for each in form["elements"]))

    def tag(self, form: Json) -> str:
        _expect_keys(form, {"begin", "content", "end"}, {"type"})
        return self._rule(f"{self._literal(form['begin'])} {self._rest_of_tag(form)}")

    def tags_with_separator(self, form: Json) -> str:
        _expect_keys(form, {"type", "tags", "separator"}, {"at_least_one", "stop_after_first"})
        one = self._rule(" | ".join(self.tag(each) for each in form["tags"]))
        more = "" if form.get("stop_after_first") else f"({self._literal(form['separator'])} {one})*"
        several = self._rule(f"{one} {more}")
        return several if form.get("at_least_one") else f"{several}?"

    def triggered_tags(self, form: Json) -> str:
        _expect_keys(form, {"tags", "triggers"}, {"type", "at_least_one", "stop_after_first"})
        begun = [self._triggered(each, form["triggers"]) for each in form["tags"]]
        if not begun:
            raise ValueError("a structural tag needs at least one tag")
        tags = self._rule(" | ".join(begun))
        if form.get("at_least_one"):
            first = self._rule(" | ".join(self.tag(each) for each in form["tags"]))
            return first if form.get("stop_after_first") else self._rule(f"{first} {tags}* ANY")
        return self._rule(f"{tags} | ANY" if form.get("stop_after_first") else f"{tags}* ANY")

    def _triggered(self, tag: Json, triggers: Sequence[str]) -> str:
        """Free text up to the tag's trigger, and the tag."""
        _expect_keys(tag, {"begin", "content", "end"}, {"type"})
        begin = tag["begin"]
        trigger = next((each for each in triggers if each and begin.startswith(each)), None)
        if trigger is None:
            raise ValueError(f"begin {begin!r} starts with none of the triggers {triggers}")
        rest = f"{self._literal(begin[len(trigger) :])} {self._rest_of_tag(tag)}"
        tokens = self._vocabulary.tokenize_str(trigger, parse_special=True)
        if self._vocabulary.is_special_token(tokens[0]):
            return self._rule(f"ANY {self._literal(trigger)} {rest}")
        free = self._rule(f"ANY {self._literal(trigger)}", "[lazy]")
        return self._rule(f"{free} {rest}")

    def _rest_of_tag(self, tag: Json) -> str:
        """Content and end."""
        content, ends = tag["content"], tag["end"]
        ends = [ends] if isinstance(ends, str) else ends
        if content["type"] == "any_text" and any(ends):
            texts = [self._any_until(end) for end in ends]
            return self._rule(" | ".join(texts))
        end = self._rule(" | ".join(self._literal(each) or '""' for each in ends)) if any(ends) else ""
        return f"{self.write(content)} {end}"

    def _any_until(self, end: str) -> str:
        tokens = self._vocabulary.tokenize_str(end, parse_special=True)
        if self._vocabulary.is_special_token(tokens[0]):
            return self._rule(f"ANY {self._literal(end)}")
        return self._rule(f"ANY {self._literal(end)}", "[lazy]")

    def _literal(self, text: str) -> str:
        """Exactly this text, its special tokens as tokens."""
        parts: list[str] = []
        plain: list[int] = []
        for token in [*self._vocabulary.tokenize_str(text, parse_special=True), None]:
            if token is not None and not self._vocabulary.is_special_token(token):
                plain.append(token)
                continue
            if plain:
                parts.append(json.dumps(self._vocabulary.decode_str(plain)))
                plain = []
            if token is not None:
                parts.append(f"<[{token}]>")
        return " ".join(parts)

    def _rule(self, body: str, attributes: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def _refer(self, lark: str) -> str:
        name = f"g{len(self._others)}"
        self._others.append({"name": name, "lark_grammar": lark})
        return f"@{name}"


_FORMATS: dict[str, Callable[[_Writer, Json], str]] = {
    "const_string": _Writer.const_string,
    "json_schema": _Writer.json_schema,
    "any_text": _Writer.any_text,
    "regex": _Writer.regex,
    "grammar": _Writer.ebnf,
    "sequence": _Writer.sequence,
    "or": _Writer.either,
    "tag": _Writer.tag,
    "triggered_tags": _Writer.triggered_tags,
    "tags_with_separator": _Writer.tags_with_separator,
}


def _expect_keys(given: Json, needed: set[str], optional: set[str]) -> None:
    """What is not known is refused, not ignored."""
    if missing := needed - given.keys():
        raise ValueError(f"a structural tag lacks {', '.join(sorted(missing))}")
    if unknown := given.keys() - needed - optional:
        raise ValueError(f"a structural tag has no {', '.join(sorted(unknown))}")
