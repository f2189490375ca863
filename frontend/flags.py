"""Command-line flags made from a class of options: one for each field, with the text under it as its help."""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any


def add_flags(
    parser: argparse.ArgumentParser,
    title: str,
    cls: type,
    skip: Sequence[str] = (),
    defaults: Mapping[str, str] | None = None,
    *,
    fills: bool = False,
) -> None:
    """One flag for each field of `cls`, whose names it has in the namespace, with dashes for underscores.

    Args:
        skip: fields without a flag.
        defaults: of some fields, for the help; they are this command's own.
        fills: the namespace has the field's default for a flag that is not given, not nothing.
    """
    group = parser.add_argument_group(title)
    docs = _field_docs(cls)
    for name, value in (defaults or {}).items():
        docs[name] = f"{docs[name].partition(' (default:')[0]} (default: {value!r})"
    for name, kind in typing.get_type_hints(cls).items():
        if name in skip:
            continue
        flag = "engine-core" if name == "engine_core_address" else name.replace("_", "-")
        default = getattr(cls, name) if fills else argparse.SUPPRESS
        given: dict[str, Any] = {"dest": name, "default": default, "help": docs.get(name)}
        if any(typing.get_origin(option) is dict for option in typing.get_args(kind)):
            given |= {"type": _json_object, "metavar": "JSON"}
        elif kind is bool:
            given["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is typing.Literal:
            given["choices"] = typing.get_args(kind)
        else:
            (given["type"],) = {kind, *typing.get_args(kind)} & {str, int, float}
            given["metavar"] = name.rpartition("_")[2].upper()
        group.add_argument(f"--{flag}", **given)


def add_hidden_flags(
    parser: argparse.ArgumentParser,
    neutral: Mapping[str, tuple[Sequence[object], str]],
    *,
    fills: bool = False,
) -> None:
    """Flags that no help shows, for arguments with few good values (the first is what holds without them).

    Those that the parser has already stay as they are.
    """
    taken = {action.dest for action in parser._actions}
    for name, (values, _) in neutral.items():
        if name in taken:
            continue
        default = values[0] if fills else argparse.SUPPRESS
        given: dict[str, Any] = {"dest": name, "default": default, "help": argparse.SUPPRESS}
        if isinstance(values[0], bool):
            given["action"] = argparse.BooleanOptionalAction
        else:
            given["type"] = int if isinstance(values[0], int) else str
        parser.add_argument(f"--{name.replace('_', '-')}", **given)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r:.100}")
    return value


def _field_docs(cls: type) -> dict[str, str]:
    """The strings under the fields of a dataclass, which Python itself does not keep."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    docs: dict[str, str] = {}
    for field, below in itertools.pairwise(ast.iter_child_nodes(definition)):
        match field, below:
            case (
                ast.AnnAssign(target=ast.Name(id=name), value=default),
                ast.Expr(value=ast.Constant(value=str(doc))),
            ):
                shown = f" (default: {ast.unparse(default)})" if default else ""
                docs[name] = f"{doc}{shown}".replace("%", "%%")
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as default), _:
                docs[name] = f"default: {ast.unparse(default)}".replace("%", "%%")
    return docs
