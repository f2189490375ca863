"""examples/deploy: the units are units, and what they start starts, reloads and stops as they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
TIMEOUT = 30.0


def setting(unit: str, name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", (DEPLOY / unit).read_text(), re.MULTILINE)
    return str(value)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", ["headrace-core.service", "headrace-serve@.service"])
def test_systemd_finds_nothing_wrong(unit: str, tmp_path: Path) -> None:
    text = (DEPLOY / unit).read_text().replace("/opt/headrace/bin/headrace", "/bin/true")
    (tmp_path / unit).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_core_of_the_unit(oracle_folder: Path, tmp_path: Path) -> None:
    command = setting("headrace-core.service", "ExecStart").replace("/run/headrace", str(tmp_path / "run"))
    executable, *words = shlex.split(command)
    assert executable == "/opt/headrace/bin/headrace"
    assert words.pop() == "$HEADRACE_CORE_FLAGS"
    words += ["--model", str(oracle_folder), "--load-format", "oracle", "--skip-tokenizer-init"]
    headrace = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, (tmp_path / "log").open("wb") as log:
        manager.settimeout(TIMEOUT)
        manager.bind(str(tmp_path / "notify"))
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        core = subprocess.Popen([*headrace, *words], stderr=log, env=environment)
        try:
            while not manager.recv(4096).startswith(b"READY=1"):
                pass
            core.send_signal(signal.SIGHUP)
            while b'"event": "reloaded"' not in (tmp_path / "log").read_bytes():
                assert manager.recv(4096) == b"WATCHDOG=1"
            core.terminate()
            assert core.wait(TIMEOUT) == 0
        finally:
            core.kill()
            core.wait()
    drain = float(words[words.index("--drain-timeout") + 1])
    assert float(setting("headrace-core.service", "TimeoutStopSec")) > drain
    assert setting("headrace-core.service", "MemoryMax") == "90%"  # behind what the core bounds itself
    assert int(setting("headrace-core.service", "LimitNOFILE")) > 10_000
