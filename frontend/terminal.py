"""Answers in the terminal: `headrace run` and `headrace chat`.

Text goes to standard output as it comes and nothing else does, so that a pipe gets the answer alone; colours,
figures and errors go to standard error. Ctrl-C aborts the answer under way; in a chat the program goes on.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import rich.console
import rich.markup

from ..ipc.errors import ConfigError, EngineDeadError, RequestError
from .async_llm import AsyncLLM
from .engine_args import AsyncEngineArgs
from .outputs import RequestMetrics
from .prompts import Prompt, parse_prompt
from .sampling_params import RequestOutputKind, SamplingParams

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
_HELP = "/clear forgets the conversation, /help shows this, /exit or Ctrl-D leaves; Ctrl-C stops an answer"


@dataclass(frozen=True)
class Answering:
    """How to answer: with which engine, and how each answer is sampled. Raises RequestError."""

    engine_args: AsyncEngineArgs
    sampling: dict[str, float | int | None]
    """`SamplingParams` fields; None is the model's default."""
    system: str | None = None
    """A first message for the chat template."""

    def __post_init__(self) -> None:
        self._sampled(SamplingParams())  # a bad value should not cost an engine's start

    def run(self, prompt: str, *, raw: bool) -> int:
        """Answer once; returns the exit code. `raw` continues the text instead of answering a message."""
        terminal = _Terminal()
        with _started(self.engine_args) as engine, asyncio.Runner() as runner:
            answer = _Answer(engine, self._params(engine))
            messages = [*self._opening(), {"role": "user", "content": prompt}]
            try:
                continues = raw or (self.system is None and not _chats(engine))
                runner.run(answer.show(prompt if continues else _render(engine, messages)))
            except KeyboardInterrupt:
                return INTERRUPTED
            except (RequestError, EngineDeadError) as error:
                terminal.complain(error)
                return 1
            finally:
                _end_line(answer.text)
            terminal.figures(answer.metrics)
        return 0

    def chat(self) -> int:
        """Talk until the input ends; returns the exit code."""
        terminal = _Terminal()
        with _started(self.engine_args) as engine, asyncio.Runner() as runner:
            engine.get_tokenizer()  # refused here rather than after the first message
            params = self._params(engine)
            messages = self._opening()
            terminal.note(f"{engine.config.served_model_name}: {_HELP}")
            while (line := terminal.ask()) is not None:
                match line.strip():
                    case "":
                        continue
                    case "/exit" | "/quit" | "/bye":
                        break
                    case "/help" | "/?":
                        terminal.note(_HELP)
                        continue
                    case "/clear":
                        messages = self._opening()
                        continue
                messages.append({"role": "user", "content": line})
                answer = _Answer(engine, params)
                try:
                    runner.run(answer.show(_render(engine, messages)))
                except KeyboardInterrupt:
                    _end_line(answer.text)
                    terminal.note("(stopped)")
                except RequestError as error:
                    messages.pop()
                    terminal.complain(error)
                    continue
                except EngineDeadError as error:
                    _end_line(answer.text)
                    terminal.complain(error)
                    return 1
                else:
                    _end_line(answer.text)
                    terminal.figures(answer.metrics)
                messages.append({"role": "assistant", "content": answer.text})
        return 0

    def _opening(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _params(self, engine: AsyncLLM) -> SamplingParams:
        params = self._sampled(engine.get_default_sampling_params())
        params.output_kind = RequestOutputKind.DELTA
        return params

    def _sampled(self, params: SamplingParams) -> SamplingParams:
        """`params` with what was asked for; without a limit of tokens unless there is one."""
        params.max_tokens = None
        for name, value in self.sampling.items():
            if value is not None:
                setattr(params, name, value)
        params.verify()
        return params


class _Answer:
    """One answer as it is written."""

    def __init__(self, engine: AsyncLLM, params: SamplingParams) -> None:
        self._engine = engine
        self._params = params
        self.text = ""
        self.metrics: RequestMetrics | None = None

    async def show(self, prompt: Prompt) -> None:
        """Write it as it comes. Cancelling it aborts the request."""
        async with self._engine.generate(prompt, self._params) as outputs:
            async for output in outputs:
                delta = output.outputs[0].text
                self.text += delta
                self.metrics = output.metrics
                sys.stdout.write(delta)
                sys.stdout.flush()


class _Terminal:
    """Where everything but answers goes: standard error. Silent unless someone looks at both."""

    def __init__(self) -> None:
        self._console = rich.console.Console(stderr=True, highlight=False)
        self._is_watched = sys.stdout.isatty() and self._console.is_terminal

    def ask(self) -> str | None:
        """The next line; None when there is no more. Ctrl-C forgets what was typed."""
        while True:
            try:
                return input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                self.note("\n(Ctrl-D leaves)")

    def note(self, text: str) -> None:
        if self._is_watched:
            self._console.print(rich.markup.escape(text), style="dim")

    def complain(self, error: Exception) -> None:
        self._console.print(rich.markup.escape(str(error)), style="red", soft_wrap=True)

    def figures(self, metrics: RequestMetrics | None) -> None:
        if metrics is None or metrics.first_token_latency is None:
            return
        parts = [
            f"{metrics.num_generation_tokens} tokens",
            f"first after {metrics.first_token_latency:.2f} s",
        ]
        if mean := metrics.mean_inter_token_latency:
            parts.append(f"{1 / mean:.1f} tokens/s")
        self.note(", ".join(parts))


@contextmanager
def _started(args: AsyncEngineArgs) -> Iterator[AsyncLLM]:
    """An engine that ends with the block. Exits where there can be none: it has said why."""
    try:
        engine = AsyncLLM(args)
    except (ConfigError, EngineDeadError) as error:
        _Terminal().complain(error)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    try:
        yield engine
    finally:
        engine.shutdown()


def _chats(engine: AsyncLLM) -> bool:
    return engine.tokenizer is not None and engine.tokenizer.chat_template is not None


def _render(engine: AsyncLLM, messages: Sequence[dict[str, str]]) -> Prompt:
    """Raises RequestError."""
    tokenizer = engine.get_tokenizer()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    parse_prompt(text)  # a terminal can send what is no text
    return tokenizer.encode(text, add_special_tokens=False)


def _end_line(text: str) -> None:
    if text and not text.endswith("\n"):
        with suppress(BrokenPipeError):
            sys.stdout.write("\n")
            sys.stdout.flush()
