"""An engine in every kind of program: it starts from anywhere, and ends with the program, leaving nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from headrace import AsyncEngineArgs, AsyncLLM, ConfigError, EngineDeadError, SamplingParams
from headrace.frontend import core_process
from headrace.frontend.core_process import CoreProcess
from headrace.frontend.engine_args import resolve
from headrace.ipc import process
from headrace.ipc.messages import PROTOCOL_VERSION, FromCore, Refused, Reply
from headrace.ipc.oracle import oracle_stream
from headrace.ipc.payloads import CoreStart
from headrace.ipc.sockets import ServerSocket

from .cores import free_port

Args = Callable[..., AsyncEngineArgs]

PRELUDE = """
import asyncio, os, signal, sys, time
from headrace import AsyncEngineArgs, AsyncLLM, SamplingParams
args = AsyncEngineArgs(model={folder!r}, load_format="oracle", skip_tokenizer_init=True,
                       num_gpu_blocks_override=500)
engine = AsyncLLM.from_engine_args(args)
params = SamplingParams(max_tokens=1900, ignore_eos=True, seed=1)
async def first(engine):
    stream = engine.generate([1], params, "a")
    async for output in stream:
        print(engine._client.info.pid, flush=True)
        return stream
"""


def program(folder: Path, body: str) -> str:
    return PRELUDE.format(folder=str(folder)) + textwrap.dedent(body)


@pytest.fixture
def temp(tmp_path: Path) -> Iterator[Path]:
    """The programs' folder for temporary files, empty again at the end."""
    folder = tmp_path / "temp"
    folder.mkdir()
    yield folder
    deadline = time.monotonic() + 5
    while list(folder.iterdir()) and time.monotonic() < deadline:
        os.sched_yield()
    assert list(folder.iterdir()) == []


def start(temp: Path, *command: str, stdin: str = "") -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, *command],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
        env=os.environ | {"TMPDIR": str(temp), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert child.stdin is not None
    if stdin:
        child.stdin.write(stdin)
    child.stdin.close()
    child.stdin = None
    return child


def finish(child: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, standard output, standard error), once the core that it named is gone as well."""
    out, err = child.communicate(timeout=120)
    pids = [int(word) for word in out.split() if word.isdigit()]
    wait_gone(pids)
    return child.returncode, out, err


def wait_gone(pids: list[int]) -> None:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive


@pytest.mark.parametrize("way", ["-c", "stdin", "file"])
def test_no_main_guard_is_needed(way: str, oracle_folder: Path, temp: Path, tmp_path: Path) -> None:
    source = program(oracle_folder, "asyncio.run(first(engine))\nengine.shutdown()\nprint('done')")
    if way == "file":
        (tmp_path / "program.py").write_text(source)
        child = start(temp, str(tmp_path / "program.py"))
    else:
        child = start(temp, "-c", source) if way == "-c" else start(temp, "-", stdin=source)
    code, out, err = finish(child)
    assert (code, out.split()[-1], err) == (0, "done", "")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("asyncio.run(first(engine))", 0),  # no shutdown at all
        ("asyncio.run(first(engine))\ndel engine", 0),
        ("loop = asyncio.new_event_loop()\nstream = loop.run_until_complete(first(engine))", 0),
        ("async def main():\n    await first(engine)\n    sys.exit(3)\nasyncio.run(main())", 3),
        ("keep = asyncio.run(first(engine))\nif os.fork() == 0: sys.exit(0)\nos.wait()", 0),
    ],
    ids=["no shutdown", "dropped", "loop left open", "sys.exit in the loop", "forked"],
)
def test_the_end_of_the_program_is_the_end_of_the_engine(
    oracle_folder: Path, temp: Path, body: str, code: int
) -> None:
    got, out, err = finish(start(temp, "-c", program(oracle_folder, body)))
    assert (got, err) == (code, "")
    assert out


FORKED = """
if os.fork() == 0:
    try:
        use()
    except EngineDeadError as error:
        assert "another process" in str(error), error
    else:
        os._exit(1)
    engine.shutdown()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
use()
engine.shutdown()
print("done")
"""


@pytest.mark.parametrize(
    "use",
    [
        "use = lambda: asyncio.run(first(engine))",
        "engine.shutdown(); engine = LLM(**vars(args)); use = lambda: engine.generate([1], use_tqdm=False)",
    ],
    ids=["AsyncLLM", "LLM"],
)
def test_a_forked_process_leaves_its_parents_engine_alone(use: str, oracle_folder: Path, temp: Path) -> None:
    body = f"from headrace import LLM, EngineDeadError\n{use}\nuse()\n{FORKED}"
    code, out, err = finish(start(temp, "-c", program(oracle_folder, body)))
    assert (code, out.split()[-1], err) == (0, "done", "")


def test_ctrl_c(oracle_folder: Path, temp: Path) -> None:
    body = """
    async def main():
        stream = await first(engine)
        async for _ in engine.generate([2], params, "b"):
            pass
        await asyncio.sleep(60)
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("interrupted")
    """
    child = start(temp, "-c", program(oracle_folder, body))
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    child.send_signal(signal.SIGINT)
    code, out, err = finish(child)
    wait_gone([pid])
    assert (code, out, err) == (0, "interrupted\n", "")


def test_ctrl_c_while_it_starts(oracle_folder: Path, temp: Path) -> None:
    child = start(temp, "-c", program(oracle_folder, "time.sleep(60)"))
    family = wait_for_children(child.pid)
    child.send_signal(signal.SIGINT)
    code, _, err = finish(child)
    wait_gone(family)
    assert code in (1, -signal.SIGINT)
    assert err.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_in_a_batch_leaves_an_engine_that_works(oracle_folder: Path, temp: Path) -> None:
    source = f"""
import os, signal, threading
from headrace import LLM, SamplingParams
llm = LLM({str(oracle_folder)!r}, load_format="oracle", skip_tokenizer_init=True, num_gpu_blocks_override=500)
print(llm._engine._client.info.pid)
params = SamplingParams(max_tokens=1900, ignore_eos=True, seed=1)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        llm.generate([[1]] * 8, params, use_tqdm=False)
except KeyboardInterrupt:
    pass
params.max_tokens = 3
assert len(llm.generate([[1]], params, use_tqdm=False)[0].outputs[0].token_ids) == 3
"""
    code, out, err = finish(start(temp, "-c", source))
    assert (code, err) == (0, "")
    assert out


def wait_for_children(pid: int) -> list[int]:
    """The process's descendants, once there are any."""
    parent, deadline = psutil.Process(pid), time.monotonic() + 20
    while not (family := parent.children(recursive=True)):
        assert time.monotonic() < deadline
        os.sched_yield()
    return [member.pid for member in family]


@pytest.mark.parametrize("when", ["starting", "running"])
def test_a_killed_program_leaves_nothing(when: str, oracle_folder: Path, temp: Path) -> None:
    source = program(oracle_folder, "asyncio.run(first(engine))\ntime.sleep(60)")
    child = start(temp, "-c", source)
    if when == "running":
        assert child.stdout is not None
        child.stdout.readline()
    family = wait_for_children(child.pid)
    child.kill()
    child.communicate()
    wait_gone(family)


def test_garbage_collection_ends_the_engine(oracle_args: Args) -> None:
    async def use() -> int:
        engine = AsyncLLM(oracle_args())
        async for _ in engine.generate([1], SamplingParams(max_tokens=5)):
            pass
        return engine._client.info.pid

    pid = asyncio.run(use())
    gc.collect()
    wait_gone([pid])


def test_no_folder_for_temporary_files(oracle_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = AsyncEngineArgs(str(oracle_folder), load_format="oracle", skip_tokenizer_init=True)
    monkeypatch.setattr(tempfile, "tempdir", "/proc/no such folder")
    with pytest.raises(ConfigError, match=r"No such file or directory.*set TMPDIR"):
        AsyncLLM.from_engine_args(args)


@pytest.mark.parametrize("name", ["x" * 150, "caf\udce9"], ids=["too long", "not UTF-8"])
def test_a_temporary_folder_that_no_socket_can_be_in(oracle_folder: Path, temp: Path, name: str) -> None:
    """The socket is elsewhere, and is gone afterwards, too."""
    folder = temp / name
    folder.mkdir()
    source = program(
        oracle_folder, "asyncio.run(first(engine))\nprint(engine._client._address)\nengine.shutdown()"
    )
    code, out, err = finish(start(folder, "-c", source))
    assert (code, err) == (0, "")
    address = out.split()[-1]
    assert address.startswith("ipc:///tmp/headrace-")
    assert not Path(address.removeprefix("ipc://")).parent.exists()
    assert list(folder.iterdir()) == []
    folder.rmdir()


def test_no_rank_needs_shared_memory(text_model: Path) -> None:
    """Containers have 64 MiB of /dev/shm: nothing of an engine is mapped or opened there."""
    engine = AsyncLLM(
        AsyncEngineArgs(
            model=str(text_model), load_format="dummy", tensor_parallel_size=2, num_gpu_blocks_override=100
        )
    )

    async def main() -> None:
        async for _ in engine.generate({"prompt_token_ids": [5] * 40}, SamplingParams(max_tokens=5)):
            pass

    asyncio.run(main())
    core = psutil.Process(engine._client.info.pid)
    for each in (core, *core.children()):
        assert "/dev/shm" not in Path(f"/proc/{each.pid}/maps").read_text()
        for link in Path(f"/proc/{each.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                assert not os.readlink(link).startswith("/dev/shm")
    engine.shutdown()


# --- start-up that fails ---------------------------------------------------------------------------------


def test_a_core_that_cannot_start_raises_its_error(oracle_args: Args) -> None:
    """8 blocks of 16 cannot hold what was asked for: the core's error, with its arithmetic, in the caller."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ConfigError, match="max_model_len") as caught:
        AsyncLLM(oracle_args(num_gpu_blocks_override=8, max_model_len=1000))
    assert caught.value.parameter is not None
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_an_unsupported_architecture_is_named(oracle_folder: Path, oracle_args: Args, tmp_path: Path) -> None:
    config = (oracle_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace("LlamaForCausalLM", "WaterForCausalLM"))
    with pytest.raises(ConfigError, match="WaterForCausalLM"):
        AsyncLLM(oracle_args(model=str(tmp_path), load_format="dummy"))


def test_a_start_has_a_deadline(oracle_args: Args, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_process, "STOP_GRACE_SECONDS", 0.1)  # a stopped process heeds no SIGTERM

    core = CoreProcess(resolve(oracle_args()))
    os.kill(core.pid, signal.SIGSTOP)
    with pytest.raises(EngineDeadError, match="did not start within"):
        core.wait_until_ready(0.2)
    wait_gone([core.pid])


def test_a_core_killed_while_starting_is_reported(oracle_args: Args) -> None:
    core = CoreProcess(resolve(oracle_args()))
    os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        core.wait_until_ready()


# --- a core of its own -----------------------------------------------------------------------------------


class Standalone(NamedTuple):
    address: str
    child: process.Child


@pytest.fixture(params=["ipc", "tcp"])
def standalone(oracle_args: Args, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Standalone]:
    """A core that no frontend started."""
    (tmp_path / "s").mkdir(mode=0o700)
    address = f"ipc://{tmp_path / 's' / 'core'}"
    if request.param == "tcp":
        address = f"tcp://127.0.0.1:{free_port()}"
    ours, theirs = os.pipe()
    config = resolve(oracle_args(served_model_name="mill"))
    child = process.spawn(
        "core", "headrace.core.main:run", CoreStart(config, address, theirs), pass_fds=(theirs,)
    )
    os.close(theirs)
    with os.fdopen(ours) as status:
        assert any("Ready" in line for line in status)
        yield Standalone(address, child)
        child.stop(5)


def test_attach_and_leave(standalone: Standalone) -> None:
    async def visit(engine: AsyncLLM) -> list[int]:
        outputs = [o async for o in engine.generate([1], SamplingParams(seed=1, max_tokens=9))]
        return outputs[-1].outputs[0].token_ids

    seen = []
    for args in (
        AsyncEngineArgs(engine_core_address=standalone.address),
        AsyncEngineArgs(engine_core_address=standalone.address, model="mill"),
    ):
        engine = AsyncLLM(args)
        assert engine.config.served_model_name == "mill"
        seen.append(asyncio.run(visit(engine)))
        engine.shutdown()
    assert seen[0] == seen[1]
    with pytest.raises(ConfigError, match="block_size=64"):
        AsyncLLM(AsyncEngineArgs(engine_core_address=standalone.address, block_size=64))


def test_the_client_in_the_protocol_document(standalone: Standalone) -> None:
    """Greedy means nothing to the oracle: the program's seed, 0, picks the tokens."""
    document = Path(__file__).parents[2].joinpath("docs", "protocol.md").read_text()
    listing = document.partition("## A client in full")[2].partition("\n## ")[0]
    program = textwrap.dedent(listing).replace("ipc:///run/headrace/core", standalone.address)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    welcome, *tokens = done.stdout.splitlines()
    assert welcome == "Welcome"
    spoken = [token for line in tokens for token in json.loads(line)]
    assert spoken == oracle_stream([1, 2], 0, 8, 1000)


@pytest.mark.parametrize(
    "address",
    ["ipc:///nonexistent/core", "tcp://127.0.0.1:1", "tcp://192.0.2.1:80", "core", "ipc://" + "x" * 200],
)
def test_an_unknown_address_is_an_error_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match="engine_core_address") as caught:
        AsyncLLM(AsyncEngineArgs(engine_core_address=address))
    assert caught.value.value == address


def test_a_core_that_is_not_ready_yet_is_waited_for(standalone: Standalone) -> None:
    """It listens, as one does that loads its model, and answers when it has: as patiently as asked."""
    core = psutil.Process(standalone.child.pid)
    core.suspend()
    args = AsyncEngineArgs(engine_core_address=standalone.address, engine_core_reconnect_seconds=0.3)
    with pytest.raises(ConfigError, match=r"no answer within 0\.3 s"):
        AsyncLLM(args)
    is_resumed = threading.Event()

    def resume() -> None:
        is_resumed.set()
        core.resume()

    timer = threading.Timer(0.5, resume)
    timer.start()
    try:
        AsyncLLM(AsyncEngineArgs(engine_core_address=standalone.address)).shutdown()
        assert is_resumed.is_set()
    finally:
        timer.join()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_attached_core_that_does_not_come_back(standalone: Standalone, how: signal.Signals) -> None:
    async def main() -> None:
        args = AsyncEngineArgs(engine_core_address=standalone.address, engine_core_reconnect_seconds=1.5)
        engine = AsyncLLM(args)
        stream = engine.generate([1], SamplingParams(max_tokens=1900, ignore_eos=True))
        await anext(stream)
        os.kill(standalone.child.pid, how)
        with pytest.raises(EngineDeadError, match=r"did not come back within 1\.5 s"):
            async for _ in stream:
                pass
        assert engine.errored
        engine.shutdown()

    asyncio.run(asyncio.wait_for(main(), 120))


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (Refused(99, "this core speaks protocol 99"), "speaks protocol 99"),
        (Reply(1), r"no answer within 0\.3 s"),
        (None, r"no answer within 0\.3 s"),
    ],
)
def test_a_core_that_does_not_fit(answer: FromCore | None, names: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir(mode=0o700)
    server = ServerSocket(f"ipc://{tmp_path / 's' / 'core'}")

    def serve() -> None:
        while server.sockets[0].poll(5000):
            received = server.recv()
            if received is not None:
                if answer is not None:
                    server.send(received[0], answer)
                return

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=names) as caught:
            AsyncLLM(
                AsyncEngineArgs(
                    engine_core_address=f"ipc://{tmp_path / 's' / 'core'}", engine_core_reconnect_seconds=0.3
                )
            )
        assert caught.value.limit == f"protocol {PROTOCOL_VERSION}"
    finally:
        thread.join()
        server.close()
