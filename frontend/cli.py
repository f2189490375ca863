"""The `headrace` command.

Each subcommand is prepared by a function of its own, which imports what it needs: `headrace --help` costs
nothing. Preparing may refuse what was asked (RefusedError: one line, exit code 2); what it returns then runs.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from .. import __version__
from ..ipc import process
from ..ipc.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from ..ipc.config import EngineConfig
    from .terminal import Answering

Action: TypeAlias = Callable[[], object]

_NOBODY_READS = 141
"""Exit code when standard output was closed, as shells have it."""

_BENCHMARKS = {
    "latency": "bench_latency.py",
    "throughput": "bench_throughput.py",
    "serve": "bench_serving.py",
    "server": "bench_server.py",
    "startup": "bench_startup.py",
}
_SAMPLING_FLAGS: dict[str, Callable[[str], float | int]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "max_tokens": int,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `headrace` with these arguments, the process's own by default."""
    words = sys.argv[1:] if argv is None else list(argv)
    listing = "\n".join(f"  {name:<16}{summary}" for name, (_, summary) in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="An LLM inference engine.",
        epilog=f"commands (each has its own --help):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND", help="one of those below")
    command: str = parser.parse_args(words[:1]).command
    prepare, summary = _COMMANDS[command]
    process.take_over()
    _open_streams()
    try:
        action = prepare(_Parser(f"headrace {command}", summary), words[1:])
    except RefusedError as error:
        print(f"headrace {command}: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        try:
            action()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be written
        sys.exit(_NOBODY_READS)


def _open_streams() -> None:
    """Make those that were closed streams of the null device."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def _engine_core(parser: _Parser, words: Sequence[str]) -> Action:
    from ..ipc import addresses, payloads  # noqa: PLC0415 - see the module's docstring
    from .daemon import daemon_options  # noqa: PLC0415

    listen = "ipc:///path, tcp://127.0.0.1:PORT, or with CURVE keys tcp://HOST:PORT"
    parser.add_argument("--listen", metavar="ADDRESS", required=True, help=listen)
    parser.add_argument(
        "--curve-secret-key", metavar="FILE", help="this core's secret key, made by `headrace keygen`"
    )
    parser.add_argument(
        "--curve-client-keys",
        metavar="PATH",
        help="public keys of the clients that may connect: a file, or a folder of *.public files; "
        "SIGHUP reads them again",
    )
    parser.add_argument(
        "--drain-timeout",
        metavar="SECONDS",
        type=float,
        default=30.0,
        help="how long requests at work may take to end after SIGTERM (default: 30)",
    )
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--ready-fd", metavar="N", type=int, help="write one line to this descriptor when the core serves"
    )
    _add_engine_flags(parser)
    args = parser.parse(words)
    daemon = daemon_options(
        curve_secret_key=args.curve_secret_key,
        curve_client_keys=args.curve_client_keys,
        drain_timeout=args.drain_timeout,
        log_format=args.log_format,
        ready_fd=args.ready_fd,
        environment=os.environ,
    )
    address = addresses.check_address(args.listen, "listen", has_keys=daemon.keys is not None)
    start = payloads.CoreStart(config=_resolve(args), address=address, status_fd=None, daemon=daemon)
    return partial(process.become, "headrace.core.main:run", start)


def _status(parser: _Parser, words: Sequence[str]) -> Action:
    from ..ipc.curve import client_keys  # noqa: PLC0415 - see the module's docstring
    from .status import StatusConnection, watch  # noqa: PLC0415

    parser.add_argument("address", metavar="ADDRESS", help="where the engine core listens")
    parser.add_argument("--curve-server-key", metavar="FILE", help="the core's public key")
    parser.add_argument("--curve-secret-key", metavar="FILE", help="a secret key that the core lets in")
    parser.add_argument("--interval", metavar="SECONDS", type=float, default=1.0, help="(default: 1)")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--json", action="store_true", help="print lines of JSON instead")
    args = parser.parse(words)
    if not 0.05 <= args.interval <= 3600:
        parser.error(f"--interval must be from 0.05 to 3600 seconds, got {args.interval}")
    keys = client_keys(args.curve_server_key, args.curve_secret_key, "curve-server-key", "curve-secret-key")
    connection = StatusConnection(args.address, keys)
    shown = partial(watch, connection, sys.stdout, interval=args.interval, once=args.once)
    return lambda: sys.exit(shown(as_json=args.json))


def _keygen(parser: _Parser, words: Sequence[str]) -> Action:
    from ..ipc.curve import make_pair  # noqa: PLC0415 - see the module's docstring

    parser.add_argument("folder", metavar="DIR", type=Path, help="where to; made with mode 0700 if need be")
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        default=["server", "client"],
        help="one pair for each: NAME.secret, which stays where it is used, and NAME.public, which others "
        "get (default: server client)",
    )
    args = parser.parse(words)
    for name in args.names:
        if not name or Path(name).name != name:
            message = f"NAME must be a file name without a folder, got {name!r}"
            raise ConfigError(message, parameter="NAME", value=name)

    def write() -> None:
        for name in args.names:
            try:
                pair = make_pair(args.folder, name)
            except ConfigError as error:
                parser.error(str(error))
            for path in pair:
                print(path)

    return write


def _run(parser: _Parser, words: Sequence[str]) -> Action:
    parser.add_argument("prompt", nargs="?", help="what to say; standard input if there is none")
    parser.add_argument("--raw", action="store_true", help="continue the text: no chat template")
    _add_answer_flags(parser)
    args = parser.parse(words)
    if args.prompt is None and sys.stdin.isatty():
        parser.error("what is the prompt?")
    answering = _answering(args)
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    if not prompt.strip():
        parser.error("the prompt is empty")
    if args.raw and args.system is not None:
        parser.error("--system needs the chat template that --raw leaves out")
    return lambda: sys.exit(answering.run(prompt, raw=args.raw))


def _chat(parser: _Parser, words: Sequence[str]) -> Action:
    _add_answer_flags(parser)
    answering = _answering(parser.parse(words))
    return lambda: sys.exit(answering.chat())


def _add_answer_flags(parser: _Parser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="a first message for the chat template")
    for name, kind in _SAMPLING_FLAGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="default: the model's own")
    _add_engine_flags(parser, attaches=True, model="demo")


def _answering(args: argparse.Namespace) -> Answering:
    from .engine_args import AsyncEngineArgs  # noqa: PLC0415 - see the module's docstring
    from .terminal import Answering  # noqa: PLC0415 - see the module's docstring

    # Bytes that are no text are refused with the prompt; a character that the terminal lacks is no error.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    given = _given_engine_args(args)
    if "engine_core_address" not in given:
        given.setdefault("model", "demo")
    sampling = {name: getattr(args, name) for name in _SAMPLING_FLAGS}
    return Answering(AsyncEngineArgs(**given), sampling, args.system)


def _serve(parser: _Parser, words: Sequence[str]) -> Action:
    from . import flags  # noqa: PLC0415 - see the module's docstring
    from .engine_args import AsyncEngineArgs, known_arguments  # noqa: PLC0415
    from .server import options as server  # noqa: PLC0415

    parser.usage = f"{parser.prog} [MODEL] [options]"
    parser.add_argument("positional_model", metavar="MODEL", nargs="?", help="as --model")
    flags.add_flags(parser, "server", server.ServerOptions)
    _add_engine_flags(parser, attaches=True)
    args = vars(parser.parse(words))
    if (model := args.pop("positional_model")) is not None:
        args["model"] = model
    options = server.ServerOptions(
        **{name: args.pop(name) for name in server.ServerOptions.__struct_fields__ if name in args}
    )
    engine_args = known_arguments(args)
    server.check_installed()
    server.check_options(options)
    keys = server.read_api_keys(options, os.environ)
    engine = AsyncEngineArgs(**engine_args)

    def serve() -> None:
        from .server import main  # noqa: PLC0415 - so that --help needs none of its libraries

        main.serve(options, engine, keys)

    return serve


def _bench(parser: _Parser, words: Sequence[str]) -> Action:
    folder = Path(__file__).parents[1] / "scripts"
    parser.add_argument("kind", choices=_BENCHMARKS, help="each has its own --help")
    kind: str = parser.parse(words[:1]).kind
    command = [sys.executable, str(folder / _BENCHMARKS[kind]), *words[1:]]
    return partial(os.execv, sys.executable, command)


def _models(parser: _Parser, words: Sequence[str]) -> Action:
    from .local_models import table  # noqa: PLC0415 - see the module's docstring

    parser.parse(words)
    return lambda: print(table())


def _explain_config(parser: _Parser, words: Sequence[str]) -> Action:
    import msgspec  # noqa: PLC0415 - see the module's docstring

    from .explain import explain, table  # noqa: PLC0415

    parser.add_argument("--json", action="store_true", help="print JSON, nothing cut short")
    _add_engine_flags(parser)
    args = parser.parse(words)
    explained = explain(_given_engine_args(args))
    if args.json:
        return partial(print, msgspec.json.format(msgspec.json.encode(explained), indent=2).decode())
    return partial(print, table(explained))


def _as_vllm(parser: _Parser, words: Sequence[str]) -> Action:
    from .as_vllm import OFFERED, Program, parse_model_map  # noqa: PLC0415 - see the module's docstring

    parser.usage = f"{parser.prog} [--model-map NAME=PATH]... (script.py | - | -c CODE | -m MODULE) [args]"
    parser.epilog = f"offered: {', '.join(name for name, names in OFFERED.items() if names)}"
    parser.add_argument(
        "--model-map",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="where the program names the model NAME, take PATH (a path or `demo`)",
    )
    rest = argparse.REMAINDER
    parser.add_argument("-c", dest="code", nargs=rest, metavar="CODE", help="run this text")
    parser.add_argument("-m", dest="module", nargs=rest, metavar="MODULE", help="run this module")
    parser.add_argument("script", nargs=rest, metavar="script.py", help="run this file; `-`: standard input")
    args = parser.parse(words)
    if not (args.code or args.module or args.script):
        parser.error("which program?")
    models = parse_model_map(args.model_map)
    if args.code:
        program = Program.code(args.code)
    elif args.module:
        program = Program.module(args.module)
    else:
        program = Program.script(args.script)
    return partial(program.run, models)


def _add_engine_flags(parser: _Parser, *, attaches: bool = False, **defaults: str) -> None:
    """One flag for each field of AsyncEngineArgs, absent from the namespace unless given; vLLM's own, hidden.

    `attaches`: those that lead to a running core too. `defaults` are this command's own, for the help.
    """
    from .engine_args import ATTACHING, AsyncEngineArgs  # noqa: PLC0415 - see the module's docstring
    from .flags import add_flags, add_hidden_flags  # noqa: PLC0415
    from .vllm_arguments import NEUTRAL  # noqa: PLC0415

    skip = () if attaches else ATTACHING
    add_flags(parser, "engine arguments", AsyncEngineArgs, skip, defaults)
    add_hidden_flags(parser, NEUTRAL)


def _given_engine_args(args: argparse.Namespace) -> dict[str, Any]:
    from .engine_args import known_arguments  # noqa: PLC0415 - see the module's docstring

    return known_arguments(vars(args))


def _resolve(args: argparse.Namespace) -> EngineConfig:
    from .engine_args import AsyncEngineArgs, resolve  # noqa: PLC0415 - see the module's docstring

    return resolve(AsyncEngineArgs(**_given_engine_args(args)))


_COMMANDS: dict[str, tuple[Callable[[_Parser, Sequence[str]], Action], str]] = {
    "run": (_run, "answer one prompt in the terminal"),
    "chat": (_chat, "talk to a model in the terminal"),
    "serve": (_serve, "serve a model over HTTP, as OpenAI's API does"),
    "models": (_models, "list the models on this machine"),
    "bench": (_bench, "measure latency, throughput, serving, the HTTP server or the start"),
    "engine-core": (_engine_core, "start an engine core that AsyncLLM can attach to"),
    "status": (_status, "show what an engine core is doing, and for whom"),
    "keygen": (_keygen, "make the CURVE keys that a core needs to serve beyond this machine"),
    "as-vllm": (_as_vllm, "run a program written against vLLM's AsyncLLM or LLM"),
    "explain-config": (_explain_config, "print the configuration that these arguments lead to, and why"),
}


class _Parser(argparse.ArgumentParser):
    """One subcommand's arguments: no abbreviations, and an unknown flag is told the nearest."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(words)
        if unknown:
            flag = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unknown argument {unknown[0]!r}{hint}")
        return args

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)
