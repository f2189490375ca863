"""JSON schemas as the request wants them matched: its options written into the schema."""

from __future__ import annotations

from typing import Any

from ..ipc.grammar_messages import CheckGrammar

_OPTIONS = "x-guidance"
"""The key under which llguidance takes options from a schema."""
_ONE = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
"""Keywords whose value is a schema."""
_LISTS = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_MAPS = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def prepared(schema: Any, asked: CheckGrammar) -> Any:
    """The schema (left as it is) with the options of the request, which count more than its own."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema is an object, true or false, got {schema!r:.100}")
    if not asked.additional_properties:
        schema = _closed(schema)
    options: dict[str, Any] = {}
    if not asked.any_whitespace:
        options = {"whitespace_flexible": False}
    elif asked.whitespace_pattern is not None:
        options = {"whitespace_pattern": asked.whitespace_pattern}
    own = schema.get(_OPTIONS, {})
    if not options or not isinstance(own, dict):
        return schema
    return schema | {_OPTIONS: own | options}


def _closed(schema: Any) -> Any:
    """No object in it has properties that its schema does not speak of."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for key in _ONE:
        if key in schema:
            closed[key] = _closed(schema[key])
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            closed[key] = [_closed(each) for each in schema[key]]
    for key in _MAPS:
        if isinstance(schema.get(key), dict):
            closed[key] = {name: _closed(each) for name, each in schema[key].items()}
    if "properties" in schema or "patternProperties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed
