"""What Triton's compiler asks of a kernel's source and its interpreter does not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.py")), ids=lambda path: path.stem)
def test_annotations_of_compiled_functions(path: Path) -> None:
    """The compiler evaluates annotations, and a name of the module such as Any is an error to it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            annotations = {ast.unparse(a.annotation) for a in node.args.args if a.annotation is not None}
            assert annotations <= {"tl.constexpr", "gl.constexpr"}, f"{path.name}, {node.name}: {annotations}"
