"""From constraints to grammars: which texts each kind admits, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llguidance
import pytest
from headrace import StructuredOutputsConfig, StructuredOutputsParams
from headrace.frontend.grammar_checker import check
from headrace.ipc import grammars
from headrace.ipc.config import EngineConfig

INTEGER = {"type": "integer"}
ROOT = 'root ::= sum\nsum ::= digit ("+" digit)* # of digits\ndigit ::= [0-9]\n'
LARK = 'start: DIGIT ("+" DIGIT)*\nDIGIT: /[0-9]/\n'
TOOLS = {
    "structures": [
        {"begin": "<f=a>", "schema": INTEGER, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}


def formatted(form: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": form}


NUMBER = {"type": "json_schema", "json_schema": INTEGER}
TAG_A = {"begin": "<a>", "content": NUMBER, "end": "</a>"}
TAG_B = {"type": "tag", "begin": "<b>", "content": {"type": "any_text"}, "end": ["</b>", "!"]}


@pytest.fixture(scope="module")
def vocabulary(make_config: Callable[..., EngineConfig], text_model: Path) -> llguidance.LLTokenizer:
    path = str(text_model / "tokenizer.json")
    config = make_config(tokenizer_json=path, vocab_size=300, eos_token_ids=[0])
    return grammars.read_vocabulary(config)


def admits(vocabulary: llguidance.LLTokenizer, grammar: str, text: str) -> bool:
    """The whole text, and nothing must follow."""
    matcher = grammars.new_matcher(vocabulary, grammar)
    tokens = vocabulary.tokenize_str(text, parse_special=True)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("given", "good", "bad"),
    [
        ({"json": INTEGER}, ["12", "-3"], ["1.5", "x", "", "012"]),
        ({"json": '{"enum":["é",null]}'}, ['"é"', "null"], ["é", '"e"']),
        ({"json": "true"}, ["[1, {}]", '"a"'], ["[1", "a"]),
        ({"json_object": True}, ["{}", '{"a": [1, 2]}', '{"a":1}'], ["[]", "1", '{"a":}']),
        ({"json_object": True, "disable_any_whitespace": True}, ['{"a":[1,2]}'], ['{"a": 1}', "{ }"]),
        ({"json_object": True, "whitespace_pattern": "_?"}, ['{"a":_1}'], ['{"a": 1}']),
        (
            {"json": {"properties": {"a": INTEGER}}, "disable_additional_properties": True},
            ["{}", '{"a": 1}'],
            ['{"b": 1}'],
        ),
        ({"regex": r"[a-c]{2}\d*"}, ["ab", "cc42"], ["a", "abc", "ab "]),
        ({"regex": "水|🎡"}, ["水", "🎡"], ["水🎡", ""]),
        ({"choice": ["yes", "no", 'né\n"\\"', ""]}, ["yes", "no", 'né\n"\\"', ""], ["y", "yesno", "maybe"]),
        ({"grammar": ROOT}, ["1", "1+2+3"], ["", "1+", "12"]),
        ({"grammar": LARK}, ["1", "1+2+3"], ["", "1+", "12"]),
        (
            {"structural_tag": TOOLS},
            ["", "hi <f=a>1</f> and <f=b>true</f>.", "<g>"],
            ["<f=a>true</f>", "<f=c>"],
        ),
        ({"structural_tag": json.dumps(TOOLS)}, ["<f=a>1</f>"], ["<f=a>1"]),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, dict) else "",
)
def test_what_a_constraint_admits(
    vocabulary: llguidance.LLTokenizer, given: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    checked = check(vocabulary, StructuredOutputsParams(**given).to_check(StructuredOutputsConfig()))
    assert not checked.error
    assert [text for text in good if not admits(vocabulary, checked.grammar, text)] == []
    assert [text for text in bad if admits(vocabulary, checked.grammar, text)] == []


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ({"type": "const_string", "value": "a<|tool|>b"}, ["a<|tool|>b"], ["ab", "a"]),
        ({"type": "regex", "pattern": "a/b+"}, ["a/bb"], ["a/"]),
        ({"type": "grammar", "grammar": ROOT}, ["1+2"], ["+"]),
        ({"type": "any_text"}, ["", "a\n水"], ["<|tool|>"]),
        ({"type": "sequence", "elements": [NUMBER, {"type": "const_string", "value": "!"}]}, ["1!"], ["1"]),
        ({"type": "or", "elements": [NUMBER, {"type": "const_string", "value": "x"}]}, ["1", "x"], ["1x"]),
        (TAG_B, ["<b>any > 水</b>", "<b>!"], ["<b>", "<b>a</b>b", "<b>!!"]),
        (
            {"type": "triggered_tags", "triggers": ["<a"], "tags": [TAG_A]},
            ["", "x <a>1</a> y <a>2</a>", "<b>"],
            ["<a>", "<a>x</a>"],
        ),
        (
            {"type": "triggered_tags", "triggers": ["<a"], "tags": [TAG_A], "at_least_one": True},
            ["<a>1</a>", "<a>1</a>x<a>2</a>"],
            ["", "x<a>1</a>"],
        ),
        (
            {"type": "triggered_tags", "triggers": ["<a"], "tags": [TAG_A], "stop_after_first": True},
            ["", "x", "x<a>1</a>"],
            ["<a>1</a>x"],
        ),
        (
            {
                "type": "triggered_tags",
                "triggers": ["<|tool|>"],
                "tags": [{"begin": "<|tool|>f(", "content": NUMBER, "end": ")"}],
            },
            ["", "x", "x<|tool|>f(1)y<|tool|>f(2)"],
            ["<|tool|>", "<|tool|>g(1)", "<|tool|>f(x)"],
        ),
        (
            {"type": "tags_with_separator", "tags": [TAG_A, TAG_B], "separator": ","},
            ["", "<a>1</a>", "<a>1</a>,<b>x</b>,<a>2</a>"],
            [",", "<a>1</a>,", "<a>1</a><a>1</a>"],
        ),
        (
            {"type": "tags_with_separator", "tags": [TAG_A], "separator": ",", "at_least_one": True}
            | {"stop_after_first": True},
            ["<a>1</a>"],
            ["", "<a>1</a>,<a>1</a>"],
        ),
    ],
    ids=lambda value: value.get("type", "") if isinstance(value, dict) else "",
)
def test_formats_of_structural_tags(
    vocabulary: llguidance.LLTokenizer, form: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    params = StructuredOutputsParams(structural_tag=formatted(form))
    checked = check(vocabulary, params.to_check(StructuredOutputsConfig()))
    assert not checked.error
    assert [text for text in good if not admits(vocabulary, checked.grammar, text)] == []
    assert [text for text in bad if admits(vocabulary, checked.grammar, text)] == []


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"json": '{"a"'}, "delimiter"),
        ({"json": "7"}, "a JSON schema is"),
        ({"json": "[" * 100_000}, "nested too deeply"),
        ({"json": {"type": "nonsense"}}, "nonsense"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"format": "nonsense", "type": "string"}}, "nonsense"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\x00-\U0010ffff]"}, ""),
        ({"grammar": "root ::= other"}, "not found"),
        ({"grammar": "start: other\n"}, "other"),
        ({"grammar": "nothing of the kind"}, "not EBNF"),
        ({"structural_tag": "[]"}, "is a JSON object"),
        ({"structural_tag": {"structures": [], "triggers": ["<"]}}, "at least one tag"),
        ({"structural_tag": TOOLS | {"triggers": ["["]}}, "none of the triggers"),
        ({"structural_tag": TOOLS | {"more": 1}}, "has no more"),
        ({"structural_tag": {"structures": [{"begin": "<f="}], "triggers": ["<"]}}, "schema"),
        ({"structural_tag": formatted({"type": "nonsense"})}, "nonsense"),
        ({"structural_tag": formatted({"type": "regex", "pattern": "("})}, "unclosed"),
        ({"structural_tag": formatted({"type": "sequence", "elements": 3})}, ""),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_no_constraint_is_refused(
    vocabulary: llguidance.LLTokenizer, given: dict[str, Any], reason: str
) -> None:
    checked = check(vocabulary, StructuredOutputsParams(**given).to_check(StructuredOutputsConfig()))
    assert checked.grammar == ""
    assert checked.error
    assert reason in checked.error


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "catastrophic regex": {"regex": "(a+)+(b|c|ab)*" * 50 + "x"},
    "counted regex": {"regex": "((a{1,1000}){1,1000}b){1,1000}"},
    "regex of many states": {"regex": ".*a.{1,200}b.{200}"},
    "intersections": {"grammar": "start: A\nA: /.*a.{14}/ & /.*b.{15}/ & ~/.*c.{16}/\n"},
    "exponential grammar": {
        "grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1} a{i + 1}\n" for i in range(40)) + 'a40: "x"\n'
    },
    "ambiguous grammar": {"grammar": 'start: s\ns: s s s | s s | "a" | ""\n'},
    "grammar without an end": {"grammar": "start: s\ns: s\n"},
    "nested repetition": {"grammar": 'start: ((((("a"{1,999}){1,999}){1,999}){1,999}){1,999}){1,999}\n'},
    "ebnf nested": {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    "reference to itself": {"json": {"$ref": "#"}},
    "references in a ring": {
        "json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    },
    "exponential references": {
        "json": {
            "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
            | {"d30": {"properties": {"a": {"type": "string"}}}},
            "$ref": "#/$defs/d0",
        }
    },
    "deep schema": {"json": nested(400)},
    "properties": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}},
    "required properties": {
        "json": {"properties": {f"p{i}": {} for i in range(5000)}, "required": [f"p{i}" for i in range(5000)]}
    },
    "enum": {"json": {"enum": [f"value {i}" for i in range(15_000)]}},
    "choices": {"choice": [f"choice {i}" for i in range(10_000)]},
    "anyOf": {"json": {"anyOf": [{"properties": {f"p{i}": {}}} for i in range(1500)]}},
    "oneOf": {"json": {"oneOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(500)]}},
    "large numbers": {"json": {"type": "integer", "minimum": -(10**18), "multipleOf": 10**9 + 7}},
    "long array": {"json": {"items": {"type": "integer"}, "minItems": 10**9, "type": "array"}},
    "patterns": {
        "json": {"patternProperties": {f"^{'a' * i}[b-z]{{1,99}}$": {"type": "null"} for i in range(150)}}
    },
    "lookups": {
        "grammar": "start: "
        + " | ".join(f"T{i}" for i in range(3000))
        + "\n"
        + "".join(f"T{i}: /[a-z]+{i}.*/\n" for i in range(3000))
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_cost_little(vocabulary: llguidance.LLTokenizer, name: str) -> None:
    asked = StructuredOutputsParams(**HOSTILE[name]).to_check(StructuredOutputsConfig())
    start = time.process_time()
    checked = check(vocabulary, asked)
    seconds = time.process_time() - start
    print(f"{name}: {seconds:.3f} {checked.error[:80]!r} {len(checked.grammar)}")
    assert seconds < 1.5
    assert bool(checked.grammar) != bool(checked.error)
