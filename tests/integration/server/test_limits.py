"""What protects a server: keys, sizes and times; and clients that go away or do not read."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

SECONDS = 120
KEY = "sk-right"
STALL_SECONDS = 2


@pytest.fixture(scope="module")
def guarded(serve: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server with everything that protects it."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"sk-other\n\n {KEY} \n")
    words = ["--api-key-file", str(file), "--allowed-origins", "https://one.example, https://two.example"]
    words += ["--max-body-bytes", "100000", "--body-timeout", "1.5", "--stall-timeout", str(STALL_SECONDS)]
    words += ["--request-timeout", "1"]
    return serve(*words, HEADRACE_API_KEY="sk-environment")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_route_but_health_needs_a_key(guarded: Any) -> None:
    with guarded.client() as client:
        routes = client.get("/openapi.json", headers=bearer(KEY)).json()["paths"]
        paths = [(method, path) for path, methods in routes.items() for method in methods]
        paths += [("get", "/openapi.json"), ("get", "/"), ("get", "/nothing"), ("post", "//v1/models")]
        for method, path in paths:
            response = client.request(method, path.replace("{name}", "demo"))
            if path in ("/health", "/health/live", "/health/ready", "/ping"):
                assert response.status_code == 200
                continue
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
        for key in (KEY, "sk-other", "sk-environment"):
            assert client.get("/v1/models", headers=bearer(key)).status_code == 200
        for value in ("Bearer sk-wrong", "Bearer", KEY, f"Basic {KEY}", "Bearer sk-righ", "Bearer \xff"):
            response = client.get("/v1/models", headers={b"authorization": value.encode("latin-1")})
            assert response.status_code == 401


def test_keys_are_not_shown(guarded: Any) -> None:
    """Neither in the list of processes nor in the environment of what the server starts."""
    for pid in [guarded.process.pid, *_children(guarded.process.pid)]:
        assert b"sk-" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for pid in _children(guarded.process.pid):
        assert b"sk-environment" not in Path(f"/proc/{pid}/environ").read_bytes()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_other_origins_are_allowed_by_name_only(guarded: Any, oracle: Any) -> None:
    asking = {"origin": "https://two.example", "access-control-request-method": "POST"}
    asking["access-control-request-headers"] = "authorization,content-type"
    with guarded.client() as client, oracle.client() as closed:
        allowed = client.options("/v1/chat/completions", headers=asking)
        assert allowed.headers["access-control-allow-origin"] == "https://two.example"
        assert allowed.status_code == 200
        refused = client.options(
            "/v1/chat/completions", headers={**asking, "origin": "https://three.example"}
        )
        assert "access-control-allow-origin" not in refused.headers
        default = closed.get("/v1/models", headers={"origin": "https://two.example"})
        assert default.status_code == 200
        assert "access-control-allow-origin" not in default.headers


def test_long_bodies_are_refused(guarded: Any) -> None:
    """By their length before they are read, or when they have become too long."""
    body = json.dumps({"prompt": "x" * 100000, "max_tokens": 1}).encode()
    headers = {**bearer(KEY), "content-type": "application/json"}
    with guarded.client() as client:
        whole = client.post("/v1/completions", content=body, headers=headers)
        parts = client.post("/v1/completions", content=iter([body[:60000], body[60000:]]), headers=headers)
        assert [whole.status_code, parts.status_code] == [413, 413]
        fits = client.post("/tokenize", content=body[: 99000 - len(body)] + b'"}', headers=headers)
        assert fits.status_code == 200


def test_slow_bodies_are_refused(guarded: Any) -> None:
    with socket.create_connection(_address(guarded), timeout=SECONDS) as sock:
        head = f"POST /tokenize HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {KEY}\r\n"
        sock.sendall((head + "content-type: application/json\r\ncontent-length: 50\r\n\r\n{").encode())
        assert sock.recv(65536).startswith(b"HTTP/1.1 408 ")
        _read_to_end(sock)  # it is closed


@pytest.mark.parametrize("route", ["/tokenize", "/detokenize"])
def test_long_texts_make_nobody_wait(oracle: Any, route: str) -> None:
    body: dict[str, Any] = {"prompt": "water wheel " * 70_000, "return_token_offsets": True}
    if route == "/detokenize":
        body = {"tokens": [300, 10_000] * 700_000}
    content = json.dumps(body).encode()  # now: this process, too, can do but one thing at a time
    seconds: list[float] = []

    def post() -> None:
        with oracle.client() as client:
            began = time.monotonic()
            headers = {"content-type": "application/json"}
            assert client.post(route, content=content, headers=headers).status_code == 200
            seconds.append(time.monotonic() - began)

    shares: list[float] = []
    with oracle.client() as watcher, ThreadPoolExecutor(1) as pool:
        for _ in range(3):
            posting = pool.submit(post)
            slowest = 0.0
            while not posting.done():
                began = time.monotonic()
                watcher.get("/health/live")
                slowest = max(slowest, time.monotonic() - began)
            posting.result()
            shares.append(slowest / seconds[-1])
    assert min(shares) < 0.5, shares  # the least: others may hold up this machine, but hardly each time


@pytest.mark.parametrize("said", [b"", b"GET /health HTTP/1.1\r\nhost:", b"GET /ping HTTP/1.1\r\n\r\nGET "])
def test_a_client_that_says_nothing_is_cut_off(guarded: Any, said: bytes) -> None:
    """Or begins to and does not go on, be it after a request before."""
    began = time.monotonic()
    with socket.create_connection(_address(guarded), timeout=SECONDS) as sock:
        sock.sendall(said)
        _read_to_end(sock)
        assert 1.4 < time.monotonic() - began < 50


def test_an_answer_may_have_a_limit(guarded: Any) -> None:
    body = {"prompt": "a", "ignore_eos": True, "n": 64, "max_tokens": 8000}
    with guarded.client(headers=bearer(KEY)) as client:
        for timeout in (None, 0.01, 50):
            choices = client.post("/v1/completions", json={**body, "timeout": timeout}).json()["choices"]
            assert {choice["finish_reason"] for choice in choices} == {"timeout"}


def test_a_client_that_goes_away_ends_its_request(oracle: Any) -> None:
    """Whether it streams, waits for the whole answer, or for the end of a search."""
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True}
    wishes: list[dict[str, Any]] = [
        {"n": 64, "stream": True},
        {"n": 64},
        {"n": 10, "use_beam_search": True},
    ]
    with oracle.client() as watcher:
        for wish in wishes:
            with socket.create_connection(_address(oracle), timeout=SECONDS) as sock:
                _post(sock, {**body, **wish})
                wait_until(lambda: watcher.get("/load").json() == {"server_load": 1})
            began = time.monotonic()
            wait_until(lambda: watcher.get("/load").json() == {"server_load": 0})
            assert time.monotonic() - began < 8  # the answer itself would take tens of seconds
            wait_until(lambda: watcher.get("/stats").json()["engine"]["num_running"] == 0)


UNREAD = {
    "prompt": [[7] * 4000] * 2,
    "n": 128,
    "echo": True,
    "max_tokens": 2,
    "stream": True,
    "return_token_ids": True,
}
"""Its answer of 9 MB fills every buffer on the way."""


def expect_cut_off(client: httpx.Client, sock: socket.socket, headers: str = "") -> None:
    """A client that asks at `sock` and does not read: it alone notices."""
    began = time.monotonic()
    _post(sock, UNREAD, headers)
    wait_until(lambda: client.get("/load").json() == {"server_load": 1})
    assert client.post("/v1/completions", json={"prompt": "Hello"}).status_code == 200
    wait_until(lambda: client.get("/load").json() == {"server_load": 0})
    assert time.monotonic() - began >= STALL_SECONDS * 0.9
    end = b""
    with suppress(ConnectionError):
        while part := sock.recv(1 << 20):
            end = (end + part)[-100:]
    assert not end.endswith(b"0\r\n\r\n")  # the mark that the answer is whole


def test_a_client_that_does_not_read_is_cut_off(guarded: Any) -> None:
    with guarded.client(headers=bearer(KEY)) as client, socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(SECONDS)
        sock.connect(_address(guarded))
        expect_cut_off(client, sock, f"authorization: Bearer {KEY}\r\n")


def test_a_client_that_reads_slowly_gets_everything(guarded: Any) -> None:
    """Slower than the time after which one that reads nothing is cut off."""
    body = {**UNREAD, "prompt": [7] * 2000, "max_tokens": 1, "n": 100}
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.settimeout(SECONDS)
        sock.connect(_address(guarded))
        _post(sock, body, f"authorization: Bearer {KEY}\r\nconnection: close\r\n")
        began, end = time.monotonic(), b""
        while part := sock.recv(1 << 14):
            end = (end + part)[-100:]
            if time.monotonic() - began < 2 * STALL_SECONDS:
                time.sleep(STALL_SECONDS / 40)
        assert b"data: [DONE]" in end


def test_a_full_queue_says_when_to_come_back(serve: Callable[..., Any]) -> None:
    server = serve("--max-num-seqs", "1", "--max-queued-requests", "1")
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    with server.client() as client, ExitStack() as stack:
        for _ in range(2):  # one runs, one waits
            sock = stack.enter_context(socket.create_connection(_address(server), timeout=SECONDS))
            _post(sock, body)
        wait_until(lambda: client.get("/stats").json()["engine"]["num_waiting"] == 1)
        for stream in (True, False):
            refused = client.post("/v1/completions", json={**body, "stream": stream})
            assert refused.status_code == 429
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/health/ready").status_code == 200  # busy is not ill


def test_connections_leave_the_engine_its_files(serve: Callable[..., Any]) -> None:
    """More idle ones than the process may have: the first are served, and the core can still be replaced."""
    few = ["sh", "-c", 'ulimit -n 200 && exec "$@"', "sh"]
    server = serve("--body-timeout", "60", prefix=few)
    with server.client() as client, ExitStack() as stack:
        assert client.get("/health").status_code == 200  # its connection stays

        def crowd(count: int) -> None:
            for _ in range(count):
                stack.enter_context(socket.create_connection(_address(server), timeout=SECONDS))

        crowd(300)
        (core, *_) = psutil.Process(server.process.pid).children()
        core.kill()
        for _ in range(20):  # they would take what the dead core has left
            crowd(5)
            time.sleep(0.02)
        wait_until(lambda: client.get("/health").status_code == 200)
        assert psutil.Process(server.process.pid).children() != [core]
        assert client.post("/v1/completions", json={"prompt": "Hello"}).status_code == 200
        with server.client() as late, pytest.raises(httpx.TransportError):
            late.get("/health")


def test_https(serve: Callable[..., Any], tmp_path: Path) -> None:
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    server = serve("--ssl-certfile", cert, "--ssl-keyfile", key, "--host", "localhost")
    url = server.url.replace("127.0.0.1", "localhost")
    assert url.startswith("https://")
    with httpx.Client(verify=ssl.create_default_context(cafile=cert)) as client:
        assert client.get(f"{url}/health").status_code == 200
        assert client.post(f"{url}/v1/completions", json={"prompt": "Hello"}).status_code == 200
        began = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - began < 20  # without the client's goodbye, which TLS gives 30 s


def test_a_unix_socket(serve: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    server = serve("--uds", path, "--stall-timeout", str(STALL_SECONDS))
    with (
        httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://server") as client,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        assert client.get("/v1/models").status_code == 200
        sock.settimeout(SECONDS)
        sock.connect(path)
        expect_cut_off(client, sock)
    assert server.end() == 0
    assert not Path(path).exists()


def _address(server: Any) -> tuple[str, int]:
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return host, int(port)


def _read_to_end(sock: socket.socket) -> None:
    while sock.recv(1 << 20):
        pass


def _post(sock: socket.socket, body: dict[str, Any], headers: str = "") -> None:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n{headers}"
    sock.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
