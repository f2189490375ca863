"""What the server is told, checked before anything starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from headrace import ConfigError
from headrace.frontend.server.options import ServerOptions, check_installed, check_options, read_api_keys


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("workers", 0),
        ("max_body_bytes", 0),
        ("body_timeout", 0.0),
        ("request_timeout", float("nan")),
        ("drain_timeout", float("inf")),
        ("tool_call_parser", "mistral"),
        ("reasoning_parser", "deepseek"),
        ("chat_template", "/nonexistent"),
        ("ssl_certfile", "/nonexistent"),
    ],
)
def test_what_cannot_work_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        check_options(ServerOptions(**{name: value}))
    assert refused.value.parameter == name
    check_options(ServerOptions())


def test_keys_come_from_a_file_and_leave_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  two\n")
    environ = {"HEADRACE_API_KEY": "three", "VLLM_API_KEY": "four", "PATH": "/bin"}
    assert read_api_keys(ServerOptions(api_key_file=str(file)), environ) == ["one", "two", "three", "four"]
    assert environ == {"PATH": "/bin"}
    assert read_api_keys(ServerOptions(), environ) == []
    file.write_text("\n")
    with pytest.raises(ConfigError):  # meant to be protected: it must not end up open
        read_api_keys(ServerOptions(api_key_file=str(file)), {})


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"needs uvicorn: pip install 'headrace\[server\]'"):
        check_installed()


@pytest.mark.parametrize(
    "missing", ["opentelemetry", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"]
)
def test_the_extra_for_tracing_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """With nothing of it, with its interface alone, and with another exporter."""
    options = ServerOptions(otlp_traces_endpoint="http://localhost:4318/v1/traces")
    check_options(options)
    for name in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"pip install 'headrace\[tracing\]'"):
        check_options(options)
