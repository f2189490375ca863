"""The layered rule, read from the source text: fast, needs no install, fails with file:line."""

from __future__ import annotations

import ast
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "frontend": {"ipc"},
    "core": {"ipc"},
    "worker": {"ipc", "kernels"},
    "kernels": set(),
    "ipc": set(),
}
NO_TORCH = {"frontend", "core", "ipc"}
HEAVY = {"torch", "triton", "transformers"}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, at any depth; our own names start with 'headrace.'."""
    package = ["headrace", *path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_layers(folder: str) -> None:
    bad: list[str] = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for line, name in imports(path):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0] if top == "headrace" else None
            where = f"{path.relative_to(ROOT)}:{line}: {folder} imports {name}"
            if target is not None and target not in MAY_IMPORT[folder] | {folder, "__version__"}:
                bad.append(where)
            if top in HEAVY and folder in NO_TORCH:
                bad.append(where)
            if top in MAY_IMPORT:
                bad.append(f"{where} (write a relative import)")
    assert not bad, "\n".join(bad)


def test_packages_match_the_disk() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {
        ".".join(("headrace", *path.parent.relative_to(ROOT).parts))
        for folder in (*MAY_IMPORT, "scripts")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert listed == on_disk | {"headrace"}


def test_kernels_stays_a_namespace() -> None:
    """A regular package here would shadow Hugging Face's `kernels` whenever cwd is on sys.path."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_process_of_the_tests_unpickles() -> None:
    """`tests/no_pickle` has found its way into this process and into its children's."""
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(b"N.")
    grandchild = [sys.executable, "-P", "-c", "import pickle; pickle.loads(b'N.')"]
    child = [sys.executable, "-P", "-c", f"import subprocess; subprocess.run({grandchild})"]
    done = subprocess.run(child, capture_output=True, text=True)
    assert "something is being unpickled" in done.stderr


@pytest.mark.parametrize("module", ["headrace", "headrace.frontend.async_llm", "headrace.core.main"])
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {HEAVY!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_no_code_from_bytes() -> None:
    """Nothing that is received or read can name code to run. as_vllm.py runs the user's own program."""
    modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    calls = {"eval", "exec", "torch.load", "torch.save"}
    bad = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for folder in MAY_IMPORT
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in [*imports(path), *called(path)]
        if (name.split(".")[0] in modules or name in calls) and path.name != "as_vllm.py"
    ]
    assert not bad, "\n".join(bad)


def called(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every call of a plain name or a module's attribute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield node.lineno, ast.unparse(node.func)
