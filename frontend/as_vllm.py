"""Runs a program written against vLLM on Headrace: `headrace as-vllm their_script.py`.

Knows which modules and names of vLLM the program may import, and how `python script.py` runs a script. The
modules exist in `sys.modules` of this process only, for this run only, whether vllm is installed or not.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import inspect
import runpy
import sys
import types
import uuid
from collections.abc import Callable, Sequence
from enum import StrEnum
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict

from .. import __version__
from ..ipc.errors import ConfigError

VLLM_VERSION = f"0.26.0+headrace.{__version__}"
"""The interface that is offered, for programs that look; PEP 440 keeps the order."""


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


PromptType: TypeAlias = str | list[int] | TextPrompt | TokensPrompt


class UsageContext(StrEnum):
    """Who starts the engine: vLLM's telemetry asks; Headrace has none and does not care."""

    UNKNOWN_CONTEXT = "UNKNOWN_CONTEXT"
    LLM_CLASS = "LLM_CLASS"
    API_SERVER = "API_SERVER"
    OPENAI_API_SERVER = "OPENAI_API_SERVER"
    OPENAI_BATCH_RUNNER = "OPENAI_BATCH_RUNNER"
    ENGINE_CONTEXT = "ENGINE_CONTEXT"


class FlexibleArgumentParser(argparse.ArgumentParser):
    """vLLM's: takes underscores in the names of flags for dashes."""

    def parse_known_args(  # type: ignore[override] # argparse's own are overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_dashes(word) for word in words], namespace)


def _with_dashes(word: str) -> str:
    name, divider, value = word.partition("=")
    return name.replace("_", "-") + divider + value if word.startswith("--") else word


def random_uuid() -> str:
    """For request ids."""
    return uuid.uuid4().hex


_ASYNC_LLM, _ARGS, _LLM = (
    "headrace.frontend.async_llm",
    "headrace.frontend.engine_args",
    "headrace.frontend.llm",
)
_OUTPUTS, _SAMPLING = "headrace.frontend.outputs", "headrace.frontend.sampling_params"

OFFERED: dict[str, dict[str, tuple[str, str]]] = {
    "vllm": {
        "LLM": (_LLM, "LLM"),
        "AsyncEngineArgs": (_ARGS, "AsyncEngineArgs"),
        "AsyncLLMEngine": (_ASYNC_LLM, "AsyncLLM"),
        "CompletionOutput": (_OUTPUTS, "CompletionOutput"),
        "EngineArgs": (_ARGS, "EngineArgs"),
        "PromptType": (__name__, "PromptType"),
        "RequestOutput": (_OUTPUTS, "RequestOutput"),
        "SamplingParams": (_SAMPLING, "SamplingParams"),
        "TextPrompt": (__name__, "TextPrompt"),
        "TokensPrompt": (__name__, "TokensPrompt"),
        "__version__": (__name__, "VLLM_VERSION"),
    },
    "vllm.engine": {},
    "vllm.engine.arg_utils": {
        "AsyncEngineArgs": (_ARGS, "AsyncEngineArgs"),
        "EngineArgs": (_ARGS, "EngineArgs"),
    },
    "vllm.engine.async_llm_engine": {"AsyncLLMEngine": (_ASYNC_LLM, "AsyncLLM")},
    "vllm.entrypoints": {},
    "vllm.entrypoints.llm": {"LLM": (_LLM, "LLM")},
    "vllm.exceptions": {"VLLMValidationError": ("headrace.ipc.errors", "RequestError")},
    "vllm.inputs": {
        "PromptType": (__name__, "PromptType"),
        "TextPrompt": (__name__, "TextPrompt"),
        "TokensPrompt": (__name__, "TokensPrompt"),
    },
    "vllm.logprobs": {
        "FlatLogprobs": ("headrace.frontend.logprobs", "FlatLogprobs"),
        "Logprob": ("headrace.frontend.logprobs", "Logprob"),
        "PromptLogprobs": ("headrace.frontend.logprobs", "PromptLogprobs"),
        "SampleLogprobs": ("headrace.frontend.logprobs", "SampleLogprobs"),
    },
    "vllm.outputs": {
        "CompletionOutput": (_OUTPUTS, "CompletionOutput"),
        "RequestOutput": (_OUTPUTS, "RequestOutput"),
    },
    "vllm.sampling_params": {
        "BeamSearchParams": ("headrace.frontend.beam_search", "BeamSearchParams"),
        "RepetitionDetectionParams": ("headrace.frontend.repetition", "RepetitionDetectionParams"),
        "RequestOutputKind": (_SAMPLING, "RequestOutputKind"),
        "SamplingParams": (_SAMPLING, "SamplingParams"),
        "StructuredOutputsParams": ("headrace.frontend.structured_outputs", "StructuredOutputsParams"),
    },
    "vllm.config": {"StructuredOutputsConfig": ("headrace.ipc.config", "StructuredOutputsConfig")},
    "vllm.usage": {},
    "vllm.usage.usage_lib": {"UsageContext": (__name__, "UsageContext")},
    "vllm.utils": {
        "FlexibleArgumentParser": (__name__, "FlexibleArgumentParser"),
        "random_uuid": (__name__, "random_uuid"),
    },
    "vllm.utils.argparse_utils": {"FlexibleArgumentParser": (__name__, "FlexibleArgumentParser")},
    "vllm.v1": {},
    "vllm.v1.engine": {},
    "vllm.v1.engine.async_llm": {"AsyncLLM": (_ASYNC_LLM, "AsyncLLM")},
    "vllm.v1.engine.exceptions": {
        "EngineDeadError": ("headrace.ipc.errors", "EngineDeadError"),
        "EngineGenerateError": ("headrace.ipc.errors", "RequestError"),
    },
    "vllm.v1.metrics": {},
    "vllm.v1.metrics.reader": {
        "Counter": ("headrace.frontend.metrics", "Counter"),
        "Gauge": ("headrace.frontend.metrics", "Gauge"),
        "Histogram": ("headrace.frontend.metrics", "Histogram"),
        "Metric": ("headrace.frontend.metrics", "Metric"),
    },
}
"""vLLM module -> name -> (our module, our name)."""

_TAKES_MODEL = {"LLM", "EngineArgs", "AsyncEngineArgs"}


class ModelMap:
    """Model names of the program, and what stands in for them."""

    def __init__(self, entries: dict[str, str]) -> None:
        self._entries = entries
        self._classes: dict[type, type] = {}
        self.unused = dict.fromkeys(entries)

    def substitute(self, model: Any) -> Any:
        if not isinstance(model, str) or model not in self._entries:
            return model
        self.unused.pop(model, None)
        return self._entries[model]

    def apply(self, base: type) -> type:
        """A subclass of `base` whose first argument, `model`, and whose `tokenizer` are substituted."""
        if not self._entries:
            return base
        if base not in self._classes:
            substitute = self.substitute
            init: Callable[..., None] = base.__init__  # type: ignore[misc] # called on its own instances

            def __init__(self: object, *args: Any, **kwargs: Any) -> None:
                for name in kwargs.keys() & {"model", "tokenizer"}:
                    kwargs[name] = substitute(kwargs[name])
                init(self, *map(substitute, args[:1]), *args[1:], **kwargs)

            body = {"__init__": __init__, "__module__": base.__module__, "__qualname__": base.__qualname__}
            self._classes[base] = type(base.__name__, (base,), body)
        return self._classes[base]


class _Importer(MetaPathFinder, Loader):
    """Finds and fills the modules of `OFFERED`, and says what there is when another one is asked for."""

    def __init__(self, models: ModelMap) -> None:
        self._models = models

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "vllm":
            return None
        if fullname not in OFFERED:
            # Without `name=`: `from vllm import X` tries the module vllm.X for a name that is not there, and
            # drops a ModuleNotFoundError of that name for a terser error of its own.
            raise ModuleNotFoundError(_not_offered(fullname))
        # Every module is a package, so that this finder is asked about each missing name.
        return ModuleSpec(fullname, self, origin="headrace as-vllm", is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        offered = OFFERED[module.__name__]
        for name, (home, attribute) in offered.items():
            value = getattr(import_module(home), attribute)
            setattr(module, name, self._models.apply(value) if name in _TAKES_MODEL else value)
        module.__dict__["__all__"] = [name for name in offered if not name.startswith("_")]

        def missing(name: str) -> object:
            raise AttributeError(_not_offered(f"{module.__name__}.{name}"))

        module.__dict__["__getattr__"] = missing


def _not_offered(name: str) -> str:
    home = name.rpartition(".")[0]
    names = [key for key in OFFERED.get(home, ()) if not key.startswith("_")]
    offers = f"; {home} has {', '.join(names)}" if names else ""
    modules = ", ".join(module for module, offered in OFFERED.items() if offered)
    return f"`headrace as-vllm` does not offer {name!r}{offers}; the modules are {modules}"


def parse_model_map(entries: Sequence[str]) -> ModelMap:
    """`NAME=PATH` each; the first `=` divides. Raises ConfigError."""
    pairs: dict[str, str] = {}
    for entry in entries:
        name, divider, path = entry.partition("=")
        if not (name and divider and path):
            message = f"--model-map must be NAME=PATH, got {entry!r}"
            raise ConfigError(message, parameter="model-map", value=entry, limit="NAME=PATH")
        pairs[name] = path
    return ModelMap(pairs)


class Program(NamedTuple):
    """A program that is ready to run as `__main__`."""

    argv: list[str]
    source: str | bytes | None
    """None: the module `argv[0]`."""
    file: str
    """What tracebacks call it."""
    folder: str
    """The first entry of `sys.path`."""

    @classmethod
    def script(cls, argv: Sequence[str]) -> Program:
        """The file `argv[0]`, or standard input for `-`. Raises ConfigError."""
        if argv[0] == "-":
            return cls([*argv], sys.stdin.buffer.read(), "<stdin>", "")
        path = Path(argv[0])
        try:
            source = path.read_bytes()
        except OSError as error:
            message = f"can't open file {argv[0]!r}: {error.strerror}"
            raise ConfigError(message, parameter="script", value=argv[0]) from error
        return cls([*argv], source, str(path.absolute()), str(path.resolve().parent))

    @classmethod
    def code(cls, argv: Sequence[str]) -> Program:
        """The text `argv[0]`, as with `python -c`."""
        return cls(["-c", *argv[1:]], argv[0], "<string>", "")

    @classmethod
    def module(cls, argv: Sequence[str]) -> Program:
        """The module `argv[0]`, as with `python -m`."""
        return cls([*argv], None, "", str(Path.cwd()))

    def run(self, models: ModelMap) -> None:
        """Run it with vLLM's modules in place.

        Leaves by the program's own exception, if any, with the traceback that plain Python would print.
        """
        importer = _Importer(models)
        sys.meta_path.insert(0, importer)
        sys.argv[:] = self.argv
        _put_on_path(self.folder)
        try:
            if self.source is None:
                runpy.run_module(self.argv[0], run_name="__main__", alter_sys=True)
            else:
                self._run_source(self.source)
        except BaseException as error:
            _hide_our_frames(error, self.file)
            raise  # the interpreter knows the right exit code for each
        finally:
            sys.meta_path.remove(importer)
            for name in models.unused:
                message = f"warning: --model-map: no model {name!r} was asked for"
                print(f"headrace as-vllm: {message}", file=sys.stderr)

    def _run_source(self, source: str | bytes) -> None:
        main = types.ModuleType("__main__")
        if not self.file.startswith("<"):
            main.__file__ = self.file
        sys.modules["__main__"] = main
        code = compile(source, self.file, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(eval(code, main.__dict__))
        else:
            exec(code, main.__dict__)


def _hide_our_frames(error: BaseException, file: str) -> None:
    """Let the traceback of `error` begin in `file`, as if Python had run it."""
    shown = error.__traceback__
    while shown is not None and shown.tb_frame.f_code.co_filename != file:
        shown = shown.tb_next
    if shown is None and not isinstance(error, SyntaxError):
        return
    hook = sys.excepthook

    def excepthook(
        kind: type[BaseException], value: BaseException, trace: types.TracebackType | None
    ) -> None:
        hook(
            kind, value.with_traceback(shown) if value is error else value, shown if value is error else trace
        )

    sys.excepthook = excepthook


def _put_on_path(folder: str) -> None:
    """As `python script.py` does: first, in place of the folder of the `headrace` command."""
    if sys.flags.safe_path:
        sys.path.insert(0, folder)
    else:
        sys.path[0] = folder
