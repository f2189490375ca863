"""`headrace run` and `headrace chat`: the answer alone in a pipe, Ctrl-C for the answer under way."""

from __future__ import annotations

import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from headrace.ipc.oracle import oracle_stream
from tokenizers import decoders, models, pre_tokenizers

HEADRACE = [sys.executable, "-P", "-c", "from headrace.frontend.cli import main; main()"]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}<s>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An oracle that speaks letters and never ends by itself."""
    folder = tmp_path_factory.mktemp("model")
    letters = [chr(ord("a") + i) for i in range(26)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 27, "max_position_embeddings": 2**20}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def command(name: str, model: str, *words: str) -> list[str]:
    flags = ["--model", model, "--load-format=oracle", "--num-gpu-blocks-override=70000"]
    return [*HEADRACE, name, *flags, *words]


def answer(prompt: Sequence[int], count: int) -> str:
    """What an engine says first; "<s>", the last token, has no text."""
    tokens = oracle_stream(prompt, random.Random(0).getrandbits(62), count, 27)
    return "".join(chr(ord("a") + token) for token in tokens if token < 26)


def pipe(words: list[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, input=text, capture_output=True, text=True, timeout=180, check=False)


def test_a_pipe_gets_the_answer_and_nothing_else(model: str) -> None:
    words = command("run", model, "--max-tokens=40")
    asked, piped = pipe([*words, "abc"]), pipe(words, "abc")
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, answer([26, 0, 1, 2, 26], 40) + "\n", "")
    assert piped.stdout == asked.stdout
    assert pipe([*words, "--raw", "abc"]).stdout == answer([0, 1, 2], 40) + "\n"


@pytest.mark.parametrize("closed", ["<&- >&-", "<&- 2>&-"])
def test_streams_that_are_closed(model: str, closed: str) -> None:
    """As by `ssh host 'headrace ... <&- >&- &'`."""
    words = ["bash", "-c", f'exec "$@" {closed}', "bash", *command("run", model, "--max-tokens=40", "abc")]
    done = pipe(words)
    said = answer([26, 0, 1, 2, 26], 40) + "\n" if "2>&-" in closed else ""
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")
    assert pipe(["bash", "-c", 'exec "$@" <&-', "bash", *HEADRACE, "run"]).stderr == (
        "headrace run: the prompt is empty\n"
    )


def test_characters_that_a_terminal_lacks_are_no_error(
    text_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = pipe([*command("run", str(text_model), "--max-tokens=40", "--raw", "abc")])
    assert (done.returncode, done.stderr) == (0, "")
    assert "?" in done.stdout
    assert "surrogates" in pipe(command("run", str(text_model)), "caf\u00e9").stderr


def test_errors_are_one_line(model: str) -> None:
    bad = pipe(command("run", model, "--temperature=-1", "abc"))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "headrace run: temperature must be in [0, 2], got -1.0\n"
    for words, text in ((["run", ""], None), (["run"], " \n")):
        empty = pipe([*HEADRACE, *words], text)
        assert (empty.returncode, empty.stderr) == (2, "headrace run: the prompt is empty\n")
    ignored = pipe([*HEADRACE, "run", "--raw", "--system", "Be brief.", "abc"])
    assert (ignored.returncode, ignored.stderr.count("\n")) == (2, 1)
    assert "--system" in ignored.stderr
    for words in ([], ["--raw"]):
        no_text = pipe([*command("run", model), *words, "\udcff"])  # a byte that is no UTF-8
        assert (no_text.returncode, no_text.stdout, no_text.stderr.count("\n")) == (1, "", 1)
        assert "surrogates" in no_text.stderr
    missing = pipe([*HEADRACE, "chat", "--engine-core", "ipc:///nowhere"])
    assert missing.returncode == 2
    assert missing.stderr.startswith("engine_core_address: no engine core listens")
    assert len(missing.stderr.splitlines()) == 1


def test_a_reader_that_has_enough_ends_it_quietly(model: str) -> None:
    pipe = subprocess.PIPE
    child = subprocess.Popen(command("run", model, "abc"), stdout=pipe, stderr=pipe)
    assert child.stdout is not None
    assert child.stdout.read(5)
    child.stdout.close()
    child.stdout = None
    assert (child.communicate(timeout=60)[1], child.returncode) == (b"", 141)


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, words: list[str]) -> None:
        self._master, theirs = pty.openpty()
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, close_fds=True
        )
        os.close(theirs)
        self.seen = ""
        self._at = 0

    def wait_for(self, text: str) -> None:
        """Read until `text` has come after what was waited for before."""
        assert self._comes(text, 60), self.seen[-500:]

    def _comes(self, text: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(text, self._at)) < 0:
            if time.monotonic() > deadline:
                return False
            if select.select([self._master], [], [], 1)[0]:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
        self._at = found + len(text)
        return True

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self, shows: str) -> None:
        """Press Ctrl-C until `shows` is there: Python loses one that comes just before it waits for input."""
        self.process.send_signal(signal.SIGINT)
        while not self._comes(shows, 2):
            self.process.send_signal(signal.SIGINT)

    def end(self) -> int:
        """Close the terminal's input (Ctrl-D) and wait for the program."""
        self.type("\x04")
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self._master, 65536).decode(errors="replace")
                except OSError:  # Linux's way to say that the other end is closed
                    self.process.wait(60)
        os.close(self._master)
        return self.process.returncode


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(model: str) -> None:
    terminal = Terminal(command("chat", model))
    terminal.wait_for("> ")
    terminal.type("abc\n")
    terminal.wait_for(answer([26, 0, 1, 2, 26], 200))
    terminal.interrupt("(stopped)")
    terminal.wait_for("> ")
    terminal.type("/clear\n")
    terminal.wait_for("> ")
    terminal.interrupt("(Ctrl-D leaves)")
    assert terminal.end() == 0


def test_ctrl_c_ends_a_run(model: str) -> None:
    terminal = Terminal(command("run", model, "abc"))
    terminal.wait_for(answer([26, 0, 1, 2, 26], 200))
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(60) == 130
