"""JSON schemas, keyword by keyword and in every position: what is written at random validates, and of many
values those are admitted that validate.

In the manner of the JSON-Schema-Test-Suite, with jsonschema as the judge.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
from headrace.frontend.grammar_checker import check
from headrace.ipc import grammars
from headrace.ipc.config import EngineConfig
from headrace.ipc.grammar_messages import CheckGrammar

Schema = dict[str, Any]
STRING: Schema = {"type": "string", "maxLength": 6}
FRAGMENTS: dict[str, Schema] = {
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "integer": {"type": "integer", "minimum": -(10**6), "maximum": 10**6},
    "string": STRING,
    "several types": {"type": ["null", "boolean"]},
    "type and null": {"type": ["string", "null"], "maxLength": 4},
    "const": {"const": "wheel"},
    "const number": {"const": 3.5},
    "const null": {"const": None},
    "const object": {"const": {"a": [1, {"b": "é"}]}},
    "const array": {"const": [1, "two", None]},
    "enum": {"enum": ["a", "ab", 'quo"te', "back\\slash", "水", "🎡", "\n"]},
    "enum mixed": {"enum": [1, 2.5, "x", None, True, [1], {"a": 1}]},
    "enum of a type": {"type": "string", "enum": ["north", "south"]},
    "minLength": {"type": "string", "minLength": 3, "maxLength": 8},
    "maxLength 0": {"type": "string", "maxLength": 0},
    "length one": {"type": "string", "minLength": 1, "maxLength": 1},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}$"},
    "pattern inside": {"type": "string", "pattern": "^x?[0-9]{2}$", "maxLength": 3},
    "pattern alternatives": {"type": "string", "pattern": "^(ab|cd|ef)+$", "maxLength": 6},
    "pattern escapes": {"type": "string", "pattern": r"^\d{3}-\w\.$"},
    "pattern of quotes": {"type": "string", "pattern": '^["\\\\/]{2}$'},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "duration": {"type": "string", "format": "duration"},
    "minimum": {"type": "integer", "minimum": 17, "maximum": 1200},
    "exclusive": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    "negative": {"type": "integer", "minimum": -250, "maximum": -12},
    "one value": {"type": "integer", "minimum": 7, "maximum": 7},
    "multipleOf": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 500},
    "number": {"type": "number", "minimum": -10, "maximum": 10},
    "number, exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "number, decimals": {"type": "number", "minimum": 0.25, "maximum": 1.75},
    "number, multiple": {"type": "number", "multipleOf": 0.5, "minimum": 0, "maximum": 20},
    "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    "minItems": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 4},
    "no items": {"type": "array", "maxItems": 0},
    "items false": {"type": "array", "items": False},
    "prefixItems": {"type": "array", "prefixItems": [{"const": 1}, STRING], "items": False, "minItems": 2},
    "prefixItems and items": {
        "type": "array",
        "prefixItems": [{"const": "a"}],
        "items": {"type": "null"},
        "minItems": 1,
        "maxItems": 4,
    },
    "arrays of arrays": {
        "type": "array",
        "items": {"type": "array", "items": {"enum": [0, 1]}, "maxItems": 2},
        "maxItems": 2,
    },
    "properties": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}},
        "additionalProperties": False,
    },
    "required": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"const": 1}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "all required": {
        "type": "object",
        "properties": {"first": {"const": 1}, "second": STRING},
        "required": ["second", "first"],
        "additionalProperties": False,
    },
    "required but not described": {"type": "object", "required": ["z"], "additionalProperties": {"const": 1}},
    "no properties": {"type": "object", "additionalProperties": False},
    "additionalProperties": {
        "type": "object",
        "properties": {"a": {"const": 1}},
        "additionalProperties": {"type": "boolean"},
    },
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]$": {"type": "null"}, "^b_": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "maxProperties": {"type": "object", "additionalProperties": {"const": 1}, "maxProperties": 2},
    "strange names": {
        "type": "object",
        "properties": {'"': {"const": 1}, "\\": {"const": 2}, "é 水": {"const": 3}, "": {"const": 4}},
        "required": ['"', "\\", "é 水", ""],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "o": {
                "type": "object",
                "properties": {"p": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
                "required": ["p"],
                "additionalProperties": False,
            }
        },
        "required": ["o"],
        "additionalProperties": False,
    },
    "anyOf": {"anyOf": [{"type": "null"}, {"const": "x"}, {"type": "integer", "minimum": 1, "maximum": 9}]},
    "anyOf overlapping": {"anyOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]},
    "anyOf and type": {"type": "integer", "anyOf": [{"minimum": 5, "maximum": 9}, {"const": 1}]},
    "oneOf apart": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "oneOf by a property": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, kind: {"type": "null"}},
                "required": ["kind", kind],
                "additionalProperties": False,
            }
            for kind in ("circle", "square")
        ]
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    "allOf objects": {
        "allOf": [
            {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"const": 2}}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    "$ref": {"$ref": "#/$defs/small"},
    "annotations": {
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [1],
        "$comment": "c",
        "type": "integer",
        "minimum": 0,
        "maximum": 5,
    },
}
DEFINITIONS: Schema = {"small": {"type": "integer", "minimum": 0, "maximum": 3}}
RECURSIVE: dict[str, Schema] = {
    "list": {
        "$defs": {
            "l": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/cell"}]},
            "cell": {
                "type": "object",
                "properties": {"head": {"enum": [1, 2]}, "tail": {"$ref": "#/$defs/l"}},
                "required": ["head", "tail"],
                "additionalProperties": False,
            },
        },
        "$ref": "#/$defs/l",
    },
    "tree": {
        "type": "object",
        "properties": {"children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
        "required": ["children"],
        "additionalProperties": False,
    },
}
POSITIONS: dict[str, Callable[[Schema], Schema]] = {
    "alone": lambda fragment: fragment,
    "as a property": lambda fragment: {
        "type": "object",
        "properties": {"p": fragment, "q": {"type": "boolean"}},
        "required": ["p"],
        "additionalProperties": False,
    },
    "as items": lambda fragment: {"type": "array", "items": fragment, "minItems": 1, "maxItems": 2},
    "as a prefix": lambda fragment: {
        "type": "array",
        "prefixItems": [fragment, {"const": "end"}],
        "minItems": 2,
        "items": False,
    },
    "or null": lambda fragment: {"anyOf": [fragment, {"type": "null"}]},
    "behind a reference": lambda fragment: {"$ref": "#/$defs/it", "$defs": {"it": fragment}},
}


def in_position(name: str, position: str) -> Schema:
    schema = POSITIONS[position](FRAGMENTS[name])
    return schema | {"$defs": schema.get("$defs", {}) | DEFINITIONS}


SCHEMAS = {
    **{f"{name}, {position}": in_position(name, position) for name in FRAGMENTS for position in POSITIONS},
    **RECURSIVE,
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 5, 7, 17, 1200, 1201, -3, -2, -12, -250, -251, 10**6, 14, 500, 497),
    *(0.5, 0.25, 1.75, 1.76, -10, 10, 10.01, 2.5, 3.5, 19.5, 1e-3),
    *(
        "",
        "a",
        "ab",
        "abc",
        "abcd",
        "abcde",
        "wheel",
        'quo"te',
        "back\\slash",
        "水",
        "🎡",
        "\n",
        "x",
        "north",
    ),
    *("aa", "cc", "x12", "12", "123", "abcdef", "123-a.", "123-a", '"/', "\\\\", "2026-02-28", "2026-13-01"),
    *("127.0.0.1", "300.0.0.1", "::1", "12:00:00Z", "2026-02-28T12:00:00Z", "P1D"),
    "123e4567-e89b-12d3-a456-426614174000",
    *(
        [],
        [True],
        [1],
        [1, 2],
        [1, "two", None],
        [1, "ab"],
        ["a"],
        ["a", None],
        [[0], [1, 1]],
        [1, 2, 1, 2, 1],
    ),
    *({}, {"a": True}, {"b": None}, {"a": True, "b": None, "c": 1}, {"b": None, "c": 1}, {"a": 1}, {"z": 1}),
    *({"a": [1, {"b": "é"}]}, {"first": 1, "second": "x"}, {"a": 1, "b": 2}, {"a": 1, "other": True}),
    *({"n_a": None, "b_x": True}, {"n_ab": None}, {'"': 1, "\\": 2, "é 水": 3, "": 4}, {"o": {"p": [True]}}),
    *(
        {"kind": "circle", "circle": None},
        {"kind": "circle", "square": None},
        {"children": [{"children": []}]},
    ),
    {"head": 1, "tail": {"head": 2, "tail": None}},
]


@pytest.fixture(scope="module")
def vocabulary(make_config: Callable[..., EngineConfig], text_model: Path) -> llguidance.LLTokenizer:
    path = str(text_model / "tokenizer.json")
    return grammars.read_vocabulary(make_config(tokenizer_json=path, vocab_size=300, eos_token_ids=[0]))


def grammar_of(vocabulary: llguidance.LLTokenizer, schema: Schema) -> str:
    checked = check(vocabulary, CheckGrammar("json", json.dumps(schema), any_whitespace=False))
    assert not checked.error, checked.error
    return checked.grammar


_TIME = r"\d\d:\d\d:\d\d(\.\d+)?(z|[+-]\d\d:\d\d)"
FORMATS = jsonschema.FormatChecker(["date", "ipv4", "ipv6", "uuid"])
for kind, pattern in {
    "time": _TIME,
    "date-time": rf"\d{{4}}-\d\d-\d\dt{_TIME}",
    "duration": r"p(?!$)(\d+w|(\d+y)?(\d+m)?(\d+d)?(t(?!$)(\d+h)?(\d+m)?(\d+s)?)?)",
}.items():
    FORMATS.checks(kind)(
        lambda value, form=re.compile(pattern, re.I): not isinstance(value, str) or form.fullmatch(value)
    )


def written_at_random(
    vocabulary: llguidance.LLTokenizer, fresh: llguidance.LLMatcher, rng: random.Random
) -> str:
    """A text of random allowed tokens."""
    matcher = fresh.deep_copy()
    mask = np.zeros(-(-300 // 32), np.int32)
    tokens: list[int] = []
    closing = {vocabulary.tokenize_str(text)[0] for text in '"]}'}
    while not matcher.is_stopped():
        grammars.fill_mask(matcher, mask)
        choices = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
        ends = [token for token in choices if token in closing] or choices
        # What closes something comes more often the longer it gets: recursion has an end.
        token = rng.choice(ends if rng.random() < len(tokens) / 50 else choices)
        if token == 0:
            break
        matcher.consume_token(token)
        grammars.check(matcher)
        tokens.append(token)
        assert len(tokens) < 2000
    return vocabulary.decode_str(tokens)


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(vocabulary: llguidance.LLTokenizer, name: str) -> None:
    schema = SCHEMAS[name]
    fresh = grammars.new_matcher(vocabulary, grammar_of(vocabulary, schema))
    judge = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    rng = random.Random(name)
    for _ in range(5):
        text = written_at_random(vocabulary, fresh, rng)
        assert judge.is_valid(json.loads(text)), text
    for value in VALUES:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        tokens = vocabulary.tokenize_str(text)
        matcher = fresh.deep_copy()
        admitted = matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
        assert admitted == judge.is_valid(value), text


@pytest.mark.parametrize(
    "keyword",
    [
        {"not": {"type": "null"}},
        {"type": "array", "uniqueItems": True},
        {"type": "array", "contains": {"const": 1}},
        {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
        {"type": "object", "propertyNames": {"pattern": "a"}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"if": {"type": "null"}, "then": {"const": None}},
        {"type": "string", "format": "nonsense"},
        {"oneOf": [{"minimum": 3}, {"maximum": 5}]},
        {"type": "array", "unevaluatedItems": False},
    ],
    ids=lambda keyword: str(keyword)[:40],
)
def test_what_is_not_implemented_is_refused_not_ignored(
    vocabulary: llguidance.LLTokenizer, keyword: Schema
) -> None:
    assert check(vocabulary, CheckGrammar("json", json.dumps(keyword))).error
