"""StructuredOutputsParams: one constraint of the right type and size, and how its options reach JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from headrace import RequestError, SamplingParams, StructuredOutputsConfig, StructuredOutputsParams
from headrace.frontend.json_schemas import prepared
from headrace.frontend.structured_outputs import MAX_CHOICES, MAX_TEXT
from headrace.ipc.grammar_messages import CheckGrammar
from hypothesis import given
from hypothesis import strategies as st

DEFAULTS = StructuredOutputsConfig()
FIELDS = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({}, "structured_outputs"),
        ({"regex": "a", "json_object": True}, "structured_outputs"),
        ({"json": {}, "choice": ["a"]}, "structured_outputs"),
        ({"json": ""}, "json"),
        ({"json": 7}, "json"),
        ({"json": [1]}, "json"),
        ({"json": {"a": object()}}, "json"),
        ({"json": {"a": CYCLE}}, "json"),
        ({"regex": ""}, "regex"),
        ({"regex": b"a"}, "regex"),
        ({"regex": "\ud800"}, "regex"),
        ({"regex": "a" * (MAX_TEXT + 1)}, "regex"),
        ({"grammar": ""}, "grammar"),
        ({"grammar": {"root": "a"}}, "grammar"),
        ({"choice": []}, "choice"),
        ({"choice": "yes"}, "choice"),
        ({"choice": ["yes", 1]}, "choice"),
        ({"choice": ["a"] * (MAX_CHOICES + 1)}, "choice"),
        ({"choice": ["a" * MAX_TEXT]}, "choice"),
        ({"json_object": False}, "json_object"),
        ({"json_object": 1}, "json_object"),
        ({"structural_tag": []}, "structural_tag"),
        ({"regex": "a", "disable_any_whitespace": 1}, "disable_any_whitespace"),
        ({"regex": "a", "disable_additional_properties": None}, "disable_additional_properties"),
        ({"regex": "a", "whitespace_pattern": ""}, "whitespace_pattern"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "whitespace_pattern"),
        ({"jsn": {}}, "jsn"),
    ],
)
def test_bad_constraints_are_refused(fields: dict[str, Any], parameter: str) -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.parameter == parameter


def test_the_limits_themselves_are_accepted() -> None:
    StructuredOutputsParams(regex="a" * MAX_TEXT)
    StructuredOutputsParams(choice=["a"] * MAX_CHOICES)


def test_a_change_after_it_was_made_is_checked_too() -> None:
    params = StructuredOutputsParams(regex="a")
    params.json_object = True
    with pytest.raises(RequestError, match="exactly one of"):
        params.to_check(DEFAULTS)


def test_sampling_params_take_nothing_else() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
    assert caught.value.parameter == "structured_outputs"


def test_dicts_become_text() -> None:
    asked = StructuredOutputsParams(json={"type": "integer"}).to_check(DEFAULTS)
    assert (asked.kind, asked.text) == ("json", '{"type":"integer"}')
    asked = StructuredOutputsParams(json_object=True).to_check(DEFAULTS)
    assert (asked.kind, asked.text) == ("json", '{"type":"object"}')
    asked = StructuredOutputsParams(choice=["é", '"']).to_check(DEFAULTS)
    assert (asked.kind, asked.text) == ("choice", '["é","\\""]')


def test_the_engine_sets_defaults() -> None:
    tight = StructuredOutputsConfig(disable_any_whitespace=True, disable_additional_properties=True)
    asked = StructuredOutputsParams(json={}).to_check(tight)
    assert not asked.any_whitespace
    assert not asked.additional_properties
    # A request that names its whitespace has spoken.
    asked = StructuredOutputsParams(json={}, whitespace_pattern=" ?").to_check(tight)
    assert (asked.any_whitespace, asked.whitespace_pattern) == (True, " ?")


def ask(**options: Any) -> CheckGrammar:
    return CheckGrammar("json", "", **options)


def test_objects_are_closed_where_schemas_are_and_nowhere_else() -> None:
    schema = {
        "properties": {
            # A property of that name is no keyword.
            "properties": {"type": "integer"},
            "inner": {"anyOf": [{"patternProperties": {"a": True}}, {"type": "object"}]},
            "open": {"properties": {}, "additionalProperties": {"properties": {}}},
        },
        "$defs": {"d": {"items": {"properties": {}}}},
        "enum": [{"properties": {}}],
    }
    before = repr(schema)
    assert prepared(schema, ask(additional_properties=False)) == {
        "properties": {
            "properties": {"type": "integer"},
            "inner": {
                "anyOf": [
                    {"patternProperties": {"a": True}, "additionalProperties": False},
                    {"type": "object"},
                ]
            },
            "open": {
                "properties": {},
                "additionalProperties": {"properties": {}, "additionalProperties": False},
            },
        },
        "$defs": {"d": {"items": {"properties": {}, "additionalProperties": False}}},
        "enum": [{"properties": {}}],
        "additionalProperties": False,
    }
    assert repr(schema) == before


def test_whitespace_options_go_into_the_schema() -> None:
    assert prepared({}, ask()) == {}
    assert prepared({}, ask(any_whitespace=False)) == {"x-guidance": {"whitespace_flexible": False}}
    own = {"x-guidance": {"whitespace_pattern": "x", "item_separator": ", "}}
    assert prepared(own, ask(whitespace_pattern=" ?")) == {
        "x-guidance": {"whitespace_pattern": " ?", "item_separator": ", "}
    }
    assert prepared(True, ask()) == {}
    with pytest.raises(ValueError, match="a JSON schema is"):
        prepared(7, ask())


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.text(max_size=3) | st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers() | st.floats(), max_size=2),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, ANYTHING)))
def test_whatever_is_given_is_taken_or_refused_by_name(given_fields: dict[str, Any]) -> None:
    refused: RequestError | None = None
    try:
        asked = StructuredOutputsParams(**given_fields).to_check(DEFAULTS)
    except RequestError as error:
        refused = error
    if refused is not None:
        assert refused.parameter in (*FIELDS, "structured_outputs")
    else:
        assert 1 <= len(asked.text) <= MAX_TEXT
        assert sum(given_fields.get(kind) is not None for kind in FIELDS[:6]) == 1
