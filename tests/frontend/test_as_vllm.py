"""`headrace as-vllm` without an engine: which imports work, which are refused, and how the script is run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from headrace import ConfigError
from headrace.frontend.as_vllm import OFFERED, parse_model_map

HEADRACE = [sys.executable, "-c", "from headrace.frontend.cli import main; main()"]


class Runs:
    """Runs texts as scripts, by plain Python and by `headrace as-vllm`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "program.py"

    def plain(self, text: str, *args: str) -> subprocess.CompletedProcess[str]:
        self.script.write_text(text)
        return self._run([sys.executable, str(self.script), *args])

    def as_vllm(self, text: str, *args: str, maps: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        self.script.write_text(text)
        flags = [word for entry in maps for word in ("--model-map", entry)]
        return self._run([*HEADRACE, "as-vllm", *flags, str(self.script), *args])

    def command(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return self._run([*HEADRACE, "as-vllm", *words], stdin)

    def _run(self, command: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, input=stdin, capture_output=True, text=True, timeout=180, check=False
        )


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def test_every_offered_name_can_be_imported(runs: Runs) -> None:
    lines = [f"import {module}" for module in OFFERED]
    lines += [f"from {module} import {name}" for module, names in OFFERED.items() for name in names]
    lines += [
        "import headrace",
        "from vllm.inputs import *",
        "assert AsyncLLM is AsyncLLMEngine is headrace.AsyncLLM",
        "assert AsyncEngineArgs is headrace.AsyncEngineArgs",
        "assert issubclass(EngineDeadError, RuntimeError)",
        "assert TokensPrompt(prompt_token_ids=[1]) == {'prompt_token_ids': [1]}",
        "assert UsageContext.ENGINE_CONTEXT == 'ENGINE_CONTEXT'",
        "assert vllm.__version__.startswith('0.')",
        "import sys; assert 'torch' not in sys.modules",
    ]
    done = runs.as_vllm("\n".join(lines))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("statement", "error", "told"),
    [
        ("import vllm.lora.request", "ModuleNotFoundError", "vllm.v1.engine.async_llm"),
        ("from vllm import LoRARequest", "ModuleNotFoundError", "vllm has LLM, AsyncEngineArgs"),
        ("from vllm.sampling_params import SamplingType", "ModuleNotFoundError", "RequestOutputKind"),
        ("import vllm; vllm.envs", "AttributeError", "does not offer 'vllm.envs'"),
        (
            "import importlib; importlib.import_module('vllm.platforms')",
            "ModuleNotFoundError",
            "vllm.platforms",
        ),
    ],
)
def test_what_is_not_offered_is_refused_with_what_is(
    runs: Runs, statement: str, error: str, told: str
) -> None:
    done = runs.as_vllm(statement)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{error}: `headrace as-vllm` does not offer")
    assert told in last


def test_optional_imports_can_be_caught(runs: Runs) -> None:
    text = "import vllm\nassert not hasattr(vllm, 'x')\ntry: import vllm.x\nexcept ImportError: print('ok')"
    assert runs.as_vllm(text).stdout == "ok\n"


def test_an_installed_vllm_is_not_touched(runs: Runs) -> None:
    (runs.folder / "vllm").mkdir()
    (runs.folder / "vllm" / "__init__.py").write_text("raise SystemExit('the real one was imported')")
    assert runs.as_vllm("import vllm; print(vllm.LLM)").returncode == 0
    assert runs.plain("import vllm").stderr == "the real one was imported\n"


def test_importing_headrace_patches_nothing(runs: Runs) -> None:
    text = "import sys, headrace, headrace.frontend.as_vllm\nprint('vllm' in sys.modules)"
    assert runs.plain(text).stdout == "False\n"
    if importlib.util.find_spec("vllm") is None:
        assert "No module named 'vllm'" in runs.plain("import headrace.frontend.as_vllm, vllm").stderr


SURROUNDINGS = """
import __main__, sys
print(sys.argv, sys.path[0], __name__, __file__, __main__.__dict__ is globals())
print(len([path for path in sys.path if path == sys.path[0]]))
"""


def test_the_script_sees_what_plain_python_shows_it(runs: Runs) -> None:
    args = ("one", "--two", "-c", "--model-map", "x")
    plain = runs.plain(SURROUNDINGS, *args)
    assert plain.returncode == 0
    assert runs.as_vllm(SURROUNDINGS, *args).stdout == plain.stdout


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    1 / 0\nf()",
        "import sys\nsys.exit(7)",
        "import sys\nsys.exit('stopped')",
        "raise KeyboardInterrupt",
        "x = (",
        "import sys\nsys.excepthook = lambda *_: print('mine')\nraise ValueError",
        "import atexit\natexit.register(print, 'bye')\nprint('hello')",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('v') from e",
    ],
)
def test_ends_as_under_plain_python(runs: Runs, text: str) -> None:
    plain, ours = runs.plain(text), runs.as_vllm(text)
    assert (ours.returncode, ours.stdout, ours.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_await_at_top_level(runs: Runs) -> None:
    text = "import asyncio\nawait asyncio.sleep(0)\nasync def f():\n    yield 1\n"
    assert runs.as_vllm(f"{text}async for x in f():\n    print(x)").stdout == "1\n"
    failed = runs.as_vllm("import asyncio\nawait asyncio.sleep(0)\n1 / 0")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[1].endswith('program.py", line 3, in <module>')


def test_other_ways_to_name_a_program(runs: Runs) -> None:
    code = "import sys, vllm; print(sys.argv)"
    assert runs.command("-c", code, "a", "--b").stdout == "['-c', 'a', '--b']\n"
    assert runs.command("-", "a", stdin=code).stdout == "['-', 'a']\n"
    (runs.folder / "mod.py").write_text("import sys, vllm\nif __name__ == '__main__': print(sys.argv[1:])")
    assert runs.command("-m", "mod", "a", "-c").stdout == "['a', '-c']\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "which program?"),
        (["nowhere.py"], "can't open file 'nowhere.py'"),
        (["--model-map", "x", "nowhere.py"], "NAME=PATH"),
        (["--modelmap", "x=y", "nowhere.py"], "--model-map"),
    ],
)
def test_a_bad_command_is_one_line(runs: Runs, words: list[str], complaint: str) -> None:
    refused = runs.command(*words)
    assert refused.returncode == 2
    assert complaint in refused.stderr
    assert refused.stderr.count("\n") == 1


MAPPED = """
import headrace, vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
args = AsyncEngineArgs(model="org/model", tokenizer="org/model", seed=3)
print(args.model, args.tokenizer, args.seed, EngineArgs("org/model").model, EngineArgs("other").model)
print(isinstance(args, headrace.AsyncEngineArgs), type(args).__name__, issubclass(vllm.LLM, headrace.LLM))
try:
    AsyncEngineArgs(modle="x")
except ValueError as error:
    print(error)
"""


def test_models_are_substituted(runs: Runs) -> None:
    done = runs.as_vllm(MAPPED, maps=("org/model=/a=b/c", "unused=demo"))
    assert done.stdout.splitlines() == [
        "/a=b/c /a=b/c 3 /a=b/c other",
        "True AsyncEngineArgs True",
        "unknown engine argument 'modle'; did you mean 'model'?",
    ]
    assert done.returncode == 0
    assert done.stderr == "headrace as-vllm: warning: --model-map: no model 'unused' was asked for\n"


def test_a_server_s_usual_beginning(runs: Runs) -> None:
    text = """
from vllm import AsyncEngineArgs
from vllm.utils import FlexibleArgumentParser, random_uuid

parser = FlexibleArgumentParser()
parser.add_argument("--root-path")
parser = AsyncEngineArgs.add_cli_args(parser)
args = parser.parse_args()
assert random_uuid() != random_uuid()
found = AsyncEngineArgs.from_cli_args(args)
print(found.model, found.max_model_len, args.root_path)
"""
    words = ("--model", "some/model", "--max_model_len=64", "--root_path", "/a_b", "--disable_log_stats")
    done = runs.as_vllm(text, *words, maps=("some/model=demo",))
    assert (done.stdout, done.stderr) == ("demo 64 /a_b\n", "")


@pytest.mark.parametrize("entry", ["", "=", "name=", "=path", "name"])
def test_a_model_map_entry_has_two_sides(entry: str) -> None:
    with pytest.raises(ConfigError, match="NAME=PATH"):
        parse_model_map([entry])
