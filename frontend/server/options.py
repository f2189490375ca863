"""ServerOptions: what a caller may say about the server, as opposed to the engine behind it."""

from __future__ import annotations

from collections.abc import MutableMapping
from importlib.util import find_spec
from pathlib import Path

import msgspec

from ...ipc.errors import ConfigError
from ...ipc.logs import LogFormat
from ...ipc.process import check_platform

_LIBRARIES = ("httptools", "prometheus_client", "starlette", "uvicorn")
_TRACING = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
KEY_VARIABLES = ("HEADRACE_API_KEY", "VLLM_API_KEY")


class ServerOptions(msgspec.Struct, kw_only=True):
    """Options of `headrace serve`. Made by the command line; a worker process gets it as JSON."""

    host: str = "127.0.0.1"
    """The address to listen at; 0.0.0.0 for every interface."""
    port: int = 8000
    """0 takes a free one; the line printed once the server is ready names it."""
    uds: str | None = None
    """Listen at this Unix socket instead of at host and port."""
    workers: int = 1
    """Server processes that share the port and one engine core."""
    api_key_file: str | None = None
    """A file of API keys, one a line; HEADRACE_API_KEY in the environment is one more. None: open to all."""
    allowed_origins: str = ""
    """Origins, with commas between them, whose pages may call the server from a browser (CORS)."""
    max_body_bytes: int = 16 << 20
    """Longer request bodies are refused."""
    body_timeout: float = 30.0
    """Seconds that a client may take to send a request's head, and as long for its body."""
    request_timeout: float | None = None
    """Seconds that an answer may take; then its finish_reason is "timeout". Requests may ask for less."""
    stall_timeout: float = 60.0
    """Seconds that a client may leave its answer unread before its connection is cut."""
    drain_timeout: float = 120.0
    """Seconds that running requests get to finish after SIGTERM."""
    access_log: bool = True
    """A line on standard error for each request that is over: what it was, what it cost, how it ended."""
    log_format: LogFormat = "text"
    """"text" or "json", one object a line."""
    log_prompts: bool = False
    """Put the prompts into these lines too."""
    enable_per_request_metrics: bool = False
    """Put the request's timings into answers with one choice, as `metrics`; in streams beside the usage."""
    otlp_traces_endpoint: str | None = None
    """Send an OpenTelemetry span for each request to this OTLP address (HTTP); needs headrace[tracing]."""
    chat_template: str | None = None
    """A file with the Jinja chat template to use instead of the model's."""
    trust_request_chat_template: bool = False
    """Use the chat template that a request brings. It runs in a sandbox, but for as long as it likes, and a
    server that renders one answers nobody else: only where every client is trusted."""
    tool_call_parser: str = "auto"
    """How the model writes tool calls: hermes, llama3_json, none, or auto (from the chat template)."""
    reasoning_parser: str = "auto"
    """think separates <think>reasoning</think>, none does not; auto: where the chat template has the mark."""
    ssl_certfile: str | None = None
    """The certificate's file: serve HTTPS."""
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None
    """Accept only clients with a certificate signed by one of these."""


def check_installed() -> None:
    """Raises ConfigError when the libraries of the extra are not there, and off Linux."""
    check_platform()
    missing = [name for name in _LIBRARIES if not _is_installed(name)]
    if missing:
        message = f"the server needs {', '.join(missing)}: pip install 'headrace[server]'"
        raise ConfigError(message, parameter="server", value=missing, limit="headrace[server]")


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # nor is the package that it is a part of
        return False


def check_options(options: ServerOptions) -> None:
    """Raises ConfigError for what could only fail later."""
    for name, least, most in (("port", 0, 65535), ("workers", 1, 64), ("max_body_bytes", 1, 1 << 30)):
        value = getattr(options, name)
        if not least <= value <= most:
            raise _refusal(name, value, f"an integer from {least} to {most}")
    for name in ("body_timeout", "request_timeout", "stall_timeout", "drain_timeout"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= 86400:
            raise _refusal(name, value, "a number of seconds in (0, 86400]")
    for name, choices in (
        ("tool_call_parser", ("auto", "hermes", "llama3_json", "none")),
        ("reasoning_parser", ("auto", "think", "none")),
    ):
        if getattr(options, name) not in choices:
            raise _refusal(name, getattr(options, name), "one of " + ", ".join(choices))
    if options.ssl_certfile is None and (options.ssl_keyfile or options.ssl_ca_certs):
        raise _refusal("ssl_certfile", None, "given together with ssl_keyfile and ssl_ca_certs")
    endpoint = options.otlp_traces_endpoint
    if endpoint is not None:
        if not endpoint.startswith(("http://", "https://")):
            raise _refusal("otlp_traces_endpoint", endpoint, "an http:// or https:// address")
        if not all(map(_is_installed, _TRACING)):
            raise _refusal("otlp_traces_endpoint", endpoint, "used with pip install 'headrace[tracing]'")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs", "chat_template"):
        if (path := getattr(options, name)) is not None:
            _read(name, path)


def read_api_keys(options: ServerOptions, environ: MutableMapping[str, str]) -> list[str]:
    """The keys of the file and of the environment, out of which they are taken: no child needs them."""
    text = "" if options.api_key_file is None else _read("api_key_file", options.api_key_file)
    keys = [*text.splitlines(), *(environ.pop(name, "") for name in KEY_VARIABLES)]
    keys = [key.strip() for key in keys if key.strip()]
    if options.api_key_file is not None and not keys:
        raise _refusal("api_key_file", options.api_key_file, "a file with a key in it")
    return keys


def read_chat_template(options: ServerOptions) -> str | None:
    return None if options.chat_template is None else _read("chat_template", options.chat_template)


def _read(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        message = f"{name}: cannot read {path!r}: {error}"
        raise ConfigError(message, parameter=name, value=path) from error


def _refusal(name: str, value: object, limit: str) -> ConfigError:
    return ConfigError(f"{name} must be {limit}, got {value!r}", parameter=name, value=value, limit=limit)
