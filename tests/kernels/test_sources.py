"""What Triton's compiler asks of a kernel's source and its interpreter does not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_annotations_of_compiled_functions(path: Path) -> None:
    """The compiler evaluates annotations, and a name of the module such as Any is an error to it."""
    for node in compiled_functions(path):
        annotations = {ast.unparse(a.annotation) for a in node.args.args if a.annotation is not None}
        assert annotations <= {"tl.constexpr", "gl.constexpr"}, f"{path.name}, {node.name}: {annotations}"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_defaults_of_compiled_functions(path: Path) -> None:
    """Triton 3.6 does not make constants of defaults that are strings."""
    for node in compiled_functions(path):
        strings = [d for d in node.args.defaults if isinstance(d, ast.Constant) and isinstance(d.value, str)]
        assert not strings, f"{path.name}, {node.name}"


def compiled_functions(path: Path) -> list[ast.FunctionDef]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    ]
