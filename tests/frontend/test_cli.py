"""The command line: quick, lazy, derived from the engine's arguments, one line for each error."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from headrace import __version__
from headrace.frontend import explain
from headrace.frontend.engine_args import ATTACHING, FIELDS
from headrace.frontend.local_models import local_models
from headrace.ipc.config import EngineConfig

HEADRACE = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()"]


def headrace(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HEADRACE, *words], capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that is enough to resolve a configuration."""
    folder = tmp_path_factory.mktemp("model")
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2, "hidden_size": 8}))
    return str(folder)


def test_help_is_quick_and_lazy() -> None:
    heavy = {"torch", "transformers", "numpy", "zmq", "asyncio", "tokenizers"}
    code = (
        "import sys\nfrom headrace.frontend.cli import main\n"
        f"try: main(['--help'])\nfinally: assert not {heavy!r} & set(sys.modules)"
    )
    seconds: list[float] = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)  # not by the clock: others may be at work, too
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert all(command in shown.stdout for command in ("engine-core", "as-vllm", "explain-config"))
    assert min(seconds) < 0.3


def test_version() -> None:
    assert headrace("--version").stdout == f"headrace {__version__}\n"


def test_vllm_s_own_flags(model: str) -> None:
    words = ["explain-config", "--model", model, "--skip-tokenizer-init", "--load-format", "oracle", "--json"]
    plain = headrace(*words)
    assert headrace(*words, "--trust-remote-code", "--pipeline-parallel-size", "1").stdout == plain.stdout
    refused = headrace(*words, "--quantization", "fp8")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "quantization is not supported: weights are not quantized" in refused.stderr
    assert "quantization" not in headrace("serve", "--help").stdout


def test_the_package_is_the_command(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "headrace", "--version"]
    assert subprocess.check_output(words, text=True, cwd=tmp_path) == f"headrace {__version__}\n"


def test_every_engine_argument_is_a_flag() -> None:
    shown = headrace("engine-core", "--help").stdout
    flags = {word.rstrip(",") for word in shown.split()}
    missing = {f"--{name.replace('_', '-')}" for name in FIELDS if name not in ATTACHING} - flags
    assert not missing


@pytest.mark.parametrize("command", ["explain-config", "models"])
def test_a_reader_that_has_enough_ends_a_command_quietly(model: str, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    flags = ["--model", model, "--skip-tokenizer-init", "--load-format=dummy"]
    words = [*HEADRACE, command, *(flags if command == "explain-config" else [])]
    ended = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=250)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_explain_config_prints_what_the_arguments_lead_to(model: str) -> None:
    flags = ["--skip-tokenizer-init", "--load-format=dummy", "--no-enable-prefix-caching"]
    flags += ["--structured-outputs-config", '{"disable_any_whitespace": true}']
    flags += ["--model", model, "--max-num-seqs", "256"]
    shown = headrace("explain-config", "--json", *flags)
    assert shown.stderr == ""
    config = json.loads(shown.stdout)
    assert config["max_num_seqs"] == {"value": 256, "source": "--max-num-seqs"}  # although it is the default
    assert config["enable_prefix_caching"] == {"value": False, "source": "--enable-prefix-caching"}
    assert config["max_model_len"]["value"] == 64
    assert config["max_model_len"]["source"].startswith("config.json: max_position_embeddings")
    assert config["tokenizer"] == {"value": None, "source": "--skip-tokenizer-init"}
    assert config["block_size"] == {"value": 16, "source": "default"}
    assert config["structured_outputs_config"]["value"]["disable_any_whitespace"] is True
    lines = headrace("explain-config", *flags).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(config)
    assert "max_num_seqs 256 --max-num-seqs" in [" ".join(line.split()) for line in lines]


def test_every_value_of_the_configuration_has_a_source() -> None:
    """A new one is an argument of the same name, or explained."""
    names = {field.name for field in msgspec.structs.fields(EngineConfig)}
    assert names - set(FIELDS) <= set(explain.FOUND) | set(explain.ARGUMENT)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--max-num-sqs", "3"], "--max-num-seqs"),
        (["--max-num-seqs", "few"], "invalid int value: 'few'"),
        (["--max-num-seqs", "0"], "max_num_seqs must be an integer from 1"),
        (["--max-model-len", "65"], "max_position_embeddings=64"),
        (["--model", "/no/such/model"], "'/no/such/model'"),
        (["--max-num", "3"], "unknown argument '--max-num'"),
        (["--structured-outputs-config", "[]"], "--structured-outputs-config: must be a JSON object"),
        (["--structured-outputs-config", "{"], "--structured-outputs-config: must be a JSON object"),
    ],
)
def test_a_bad_argument_is_one_line(words: list[str], complaint: str, model: str) -> None:
    usual = ["--model", model, "--skip-tokenizer-init", "--load-format", "dummy"]
    refused = headrace("explain-config", *usual, *words)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert complaint in refused.stderr
    assert refused.stderr.startswith("headrace explain-config: ")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "--listen"),
        (["--listen", "tcp://0.0.0.0:9000"], "tcp://127.0.0.1:PORT"),
        (["--listen", "ipc:///" + "x" * 200], "longer than"),
        (["--listen", "ipc:///tmp/x", "--ready-fd", "99"], "99 is not an open descriptor"),
        (["--listen", "ipc:///tmp/x", "--drain-timeout", "nan"], "drain-timeout must be"),
        (["--listen", "tcp://0.0.0.0:9000", "--curve-secret-key", "x"], "curve-client-keys"),
        (["--listen", "ipc:///tmp/x", "--log-format", "xml"], "--log-format"),
    ],
)
def test_engine_core_refuses_a_bad_address_before_anything_starts(words: list[str], complaint: str) -> None:
    refused = headrace("engine-core", *words)
    assert refused.returncode == 2
    assert complaint in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_keygen(tmp_path: Path) -> None:
    made = headrace("keygen", str(tmp_path / "keys"))
    assert (made.returncode, made.stderr) == (0, "")
    names = ["server.secret", "server.public", "client.secret", "client.public"]
    assert made.stdout.split() == [str(tmp_path / "keys" / name) for name in names]
    again = headrace("keygen", str(tmp_path / "keys"), "guest", "client")
    assert again.returncode == 2
    assert "File exists" in again.stderr
    assert again.stderr.count("\n") == 1
    nameless = headrace("keygen", str(tmp_path / "keys"), "")
    assert (nameless.returncode, list((tmp_path / "keys").glob(".*"))) == (2, [])


def test_an_unknown_command_is_told_the_known_ones() -> None:
    refused = headrace("serv")
    assert refused.returncode == 2
    assert "engine-core" in refused.stderr


@pytest.mark.parametrize("command", ["as-vllm", "engine-core", "explain-config", "keygen"])
def test_each_command_has_help(command: str) -> None:
    shown = headrace(command, "--help")
    assert shown.returncode == 0
    assert f"usage: headrace {command}" in shown.stdout


def test_nothing_is_left_in_the_working_directory(tmp_path: Path) -> None:
    subprocess.run([*HEADRACE, "--help"], cwd=tmp_path, stdout=subprocess.DEVNULL, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["latency", "throughput", "serve", "server", "startup"])
def test_benchmarks_come_with_the_package(kind: str) -> None:
    done = headrace("bench", kind, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--model" in done.stdout


def test_models_are_the_demo_and_what_the_hub_s_cache_holds(tmp_path: Path) -> None:
    def models() -> list[str]:
        env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run(
            [*HEADRACE, "models"], capture_output=True, text=True, timeout=180, check=True, env=env
        )
        return done.stdout.splitlines()

    assert len(models()) == 1
    assert models()[0].startswith("none yet")
    repo = tmp_path / "hub" / "models--mills--wheel"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (repo / "snapshots" / "abc" / "model.safetensors").write_bytes(b"\0" * 20_000_000)
    (line,) = models()
    assert line.split()[:4] == ["mills/wheel", "LlamaForCausalLM", "0.02", "GB"]


def test_models_of_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is run as a user whom it does not know."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert "demo" not in [model.name for model in local_models()]
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_CACHE", "~headrace-has-no-such-user/hub")
    assert headrace("models").returncode == 0
