"""setup.sh: installs once, says clearly what is missing, and shows why an installation failed.

Python and pip are stood in for by a shell script that notes how it was called: the real ones take minutes.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("bash", "cat", "dirname", "env", "mkdir", "mktemp", "rm", "sha256sum", "cp", "chmod")


class Machine:
    """A fresh checkout, and a PATH with nothing but the basic tools and a `python3`."""

    def __init__(self, folder: Path) -> None:
        self.checkout = folder / "checkout"
        self.bin = folder / "bin"
        (self.checkout / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", self.checkout / "scripts")
        (self.checkout / "pyproject.toml").write_text("one")
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))

    def python(self, *, version: str = "3.12.0", has_venv: bool = True, pip: str = "exit 0") -> None:
        """Provide a `python3` that behaves like this; its venvs hold a copy of it."""
        is_old = version.startswith("3.9")
        (self.bin / "python3").write_text(
            f"""#!{self.bin}/bash
echo "$*" >>"{self.checkout}/calls"
case "$*" in
    --version) echo "Python {version}" ;;
    *version_info*) exit {int(is_old)} ;;
    *ensurepip*) exit {int(not has_venv)} ;;
    "-m venv .venv") mkdir -p .venv/bin && cp "{self.bin}/python3" .venv/bin/python ;;
    "-m pip install"*) {pip} ;;
esac
"""
        )
        (self.bin / "python3").chmod(0o755)

    def setup(self, *extras: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.bin / "bash"), "scripts/setup.sh", *extras]
        where = {"PATH": str(self.bin)}
        return subprocess.run(
            command, cwd=self.checkout, env=where, capture_output=True, text=True, timeout=30, check=False
        )

    def num_installs(self) -> int:
        return (self.checkout / "calls").read_text().count("-m pip install")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_installs_once_for_each_state(machine: Machine) -> None:
    machine.python()
    done = machine.setup()
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2
    again = machine.setup()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.num_installs() == 1
    machine.setup("dev")
    machine.setup("dev")
    assert machine.num_installs() == 2
    (machine.checkout / "pyproject.toml").write_text("two")
    machine.setup()
    assert machine.num_installs() == 3


def test_a_failed_installation_shows_why_and_is_tried_again(machine: Machine) -> None:
    machine.python(pip="echo 'no matching distribution' >&2; exit 1")
    for _ in range(2):
        failed = machine.setup()
        assert failed.returncode != 0
        assert "no matching distribution" in failed.stderr
    assert machine.num_installs() == 2


def test_harmless_warnings_are_not_shown(machine: Machine) -> None:
    machine.python(pip="echo 'WARNING: whatever' >&2")
    assert machine.setup().stderr == ""


def test_an_old_python_is_named(machine: Machine) -> None:
    machine.python(version="3.9.2")
    refused = machine.setup()
    assert refused.returncode != 0
    assert refused.stderr == "setup: Python 3.11 or newer is needed, found Python 3.9.2\n"


def test_a_missing_venv_module_is_named(machine: Machine) -> None:
    machine.python(has_venv=False)
    refused = machine.setup()
    assert refused.returncode != 0
    assert "apt install python3-venv" in refused.stderr


@pytest.mark.parametrize(
    "script", [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci/run"], ids=lambda path: path.name
)
def test_scripts_stop_at_the_first_error(script: Path) -> None:
    text = script.read_text()
    assert "set -euo pipefail" in text or text.startswith("#!/bin/sh -eu\n")
    subprocess.run(["bash", "-n", str(script)], check=True)
