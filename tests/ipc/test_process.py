"""Child processes: how they start, end, and never outlive their parent."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest
from headrace.ipc.errors import ConfigError
from headrace.ipc.process import become, spawn

ENTRY = "headrace_process_probe:run"
PROBE = """
import json, os, signal, subprocess, sys, time

def run(payload):
    order = json.loads(payload)
    print("hello from the child")
    if order["fd"] is not None:
        os.write(order["fd"], payload)
    if order["what"] == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(order["fd"], b"!")
    if order["what"] == "parent":
        order["code"] = subprocess.run([sys.executable, "-c", "import os; os._exit(7)"]).returncode
    if order["what"] in ("sleep", "stubborn"):
        time.sleep(60)
    sys.exit(order["code"])
"""


class Order(msgspec.Struct):
    what: str = "exit"
    code: int = 0
    fd: int | None = None


@pytest.fixture(autouse=True)
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that the children can import."""
    (tmp_path / "headrace_process_probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def read(descriptor: int, timeout: float = 10) -> bytes:
    """What comes next; b"" at the end of the file."""
    assert select.select([descriptor], [], [], timeout)[0], "nothing came"
    return os.read(descriptor, 1 << 16)


def test_a_child_gets_its_payload_and_its_output_is_not_ours(capfd: pytest.CaptureFixture[str]) -> None:
    reading, writing = os.pipe()
    order = Order(code=3, fd=writing)
    child = spawn("probe", ENTRY, order, pass_fds=(writing,))
    os.close(writing)
    assert msgspec.json.decode(read(reading), type=Order) == order
    assert child.cause_of_death() == f"probe (pid {child.pid}) exited with code 3"
    assert not child.alive
    child.stop(1)
    child.stop(1)
    os.close(reading)
    assert capfd.readouterr() == ("", "hello from the child\n")


@pytest.mark.parametrize(
    ("what", "grace", "killer"), [("sleep", 30, "SIGTERM"), ("stubborn", 0.2, "SIGKILL")]
)
def test_stop(what: str, grace: float, killer: str) -> None:
    reading, writing = os.pipe()
    child = spawn("probe", ENTRY, Order(what, fd=writing), pass_fds=(writing,))
    os.close(writing)
    expected = b"}\n!" if what == "stubborn" else b"}\n"
    said = b""
    while not said.endswith(expected):
        said += read(reading)
    assert child.alive
    child.stop(grace)
    assert child.cause_of_death() == f"probe (pid {child.pid}) was killed by {killer}"
    os.close(reading)


def test_a_death_by_a_signal_without_a_name() -> None:
    reading, writing = os.pipe()
    child = spawn("probe", ENTRY, Order("sleep", fd=writing), pass_fds=(writing,))
    os.close(writing)
    read(reading)
    os.kill(child.pid, signal.SIGRTMIN + 6)
    assert child.cause_of_death() == f"probe (pid {child.pid}) was killed by signal {signal.SIGRTMIN + 6}"
    child.stop(0)
    os.close(reading)


def test_an_entry_that_does_not_exist(capfd: pytest.CaptureFixture[str]) -> None:
    child = spawn("probe", "headrace_no_such_module:run", Order())
    assert child.cause_of_death().endswith("exited with code 1")
    child.stop(0)
    assert "headrace_no_such_module" in capfd.readouterr().err


def test_no_child_outlives_a_killed_parent(tmp_path: Path) -> None:
    """The parent is killed outright; the child ends by itself and takes its folder along."""
    reading, writing = os.pipe()
    folder = tmp_path / "remove me"
    folder.mkdir()
    parent_code = f"""
import sys, msgspec
sys.path.insert(0, {str(tmp_path)!r})
from headrace.ipc.process import spawn
class Order(msgspec.Struct):
    what: str
    code: int
    fd: int
child = spawn("probe", {ENTRY!r}, Order("sleep", 0, {writing}), pass_fds=({writing},), remove={str(folder)!r})
print(child.pid, flush=True)
sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(writing,),
    )
    os.close(writing)
    read(reading)
    with parent:
        parent.kill()
    assert read(reading) == b""  # only the child held the other end
    os.close(reading)
    assert not folder.exists()


def test_become_keeps_the_pid_and_has_no_parent_to_follow() -> None:
    code = f"""
import msgspec
from headrace.ipc.process import become
class Order(msgspec.Struct):
    what: str
    code: int
    fd: int
become({ENTRY!r}, Order("sleep", 0, 1))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        said = b""
        while b"hello" not in said and b'"fd":1' not in said:
            said += read(daemon.stdout.fileno())
        assert daemon.poll() is None
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(5) == -signal.SIGTERM


def test_what_cannot_be_told_and_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Path(msgspec.Struct):
        path: str = "/models/caf\udce9"

    for start in (partial(spawn, "probe", ENTRY), partial(become, ENTRY)):
        with pytest.raises(ConfigError, match=r"caf\\udce9.* UTF-8"):
            start(Path())
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(sys, "platform", "darwin")
            with pytest.raises(ConfigError, match="run on Linux; this is darwin"):
                start(Order())


def test_a_child_hears_signals_that_its_parent_has_blocked() -> None:
    reading, writing = os.pipe()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        child = spawn("probe", ENTRY, Order("sleep", fd=writing), pass_fds=(writing,))
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    os.close(writing)
    read(reading)
    child.stop(30)
    assert child.cause_of_death().endswith("was killed by SIGTERM")
    os.close(reading)


def test_a_child_hears_of_its_children_though_its_parent_ignores_its_own() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        child = spawn("probe", ENTRY, Order("parent"))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert child.cause_of_death().endswith("exited with code 7")
    child.stop(0)


CLOSED = f"""
import os, socket, sys, msgspec
from headrace.ipc.process import fill_standard_descriptors, spawn
class Order(msgspec.Struct):
    what: str
    code: int
    fd: int
if sys.argv[2] == "filled":
    fill_standard_descriptors()
other, end = socket.socketpair()
end.setblocking(False)
reading, writing = os.pipe()
child = spawn("probe", {ENTRY!r}, Order("exit", 0, writing), pass_fds=(writing,))
os.close(writing)
said = b""
while data := os.read(reading, 4096):
    said += data
child.stop(30)
try:
    said += end.recv(4096)
except BlockingIOError:
    pass
os.write(int(sys.argv[1]), said)
"""


@pytest.mark.parametrize(("closed", "filled"), [("<&- >&- 2>&-", "filled"), ("2>&-", "taken")])
def test_closed_standard_streams_are_not_mistaken_for_others(closed: str, filled: str) -> None:
    """What a child says where there is no standard error goes nowhere, and its pipes are its own."""
    reading, writing = os.pipe()
    words = [sys.executable, "-c", CLOSED, str(writing), filled]
    subprocess.run(["bash", "-c", f'exec "$@" {closed}', "bash", *words], pass_fds=(writing,), check=True)
    os.close(writing)
    said = read(reading)
    assert said.startswith(b'{"what":"exit"')
    assert said.endswith(b"}\n")
    os.close(reading)
