"""The benchmarks measure what they say, on a real engine whose model costs nothing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchlib.engines import Trace
from benchlib.harness import percentiles

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def bench(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"bench_{name}.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)


def results(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON object that the last line holds."""
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert {"benchmark", "commit", "machine", "versions", "settings", "results"} <= set(told)
    return told


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for an engine without weights or tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return ["--model", str(folder), "--load-format", "oracle"]


def test_percentiles_interpolate() -> None:
    figures = percentiles("x", [0.004, 0.001, 0.002, 0.003], (0, 50, 100))
    assert figures == {"x mean, ms": 2.5, "x p0, ms": 1.0, "x p50, ms": 2.5, "x p100, ms": 4.0}


def test_no_times_no_figures() -> None:
    assert percentiles("x", []) == {}


def test_what_a_trace_says() -> None:
    trace = Trace(10.0, [(11.0, 1), (12.0, 3), (16.0, 1)])
    assert (trace.num_tokens, trace.ttft, trace.e2e) == (5, 1.0, 6.0)
    assert trace.tpot == 5 / 4
    assert trace.gaps == [1.0, 4.0]


def test_latency_alternates_engines(oracle: list[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.jsonl"
    small = ["--batch-size", "2", "--output-len", "4", "--iters", "2", "--warmup-iters", "1"]
    twice = ["--compare", "headrace,headrace", "--rounds", "1", "--results", str(file)]
    done = bench("latency", *oracle, *small, *twice)
    told = results(done)
    figures = told["results"]["headrace"]
    turns = [json.loads(line)["figures"] for line in file.read_text().splitlines()]
    assert len(turns) == 2
    for turn in turns:  # 2 requests at x ms per token are 2000 / x tokens/s
        assert turn["output tokens/s"] * turn["per token, ms"] == pytest.approx(2000, rel=0.01)
    assert figures["per token, ms"] == pytest.approx(
        sum(turn["per token, ms"] for turn in turns) / 2, abs=1e-3
    )
    assert told["settings"]["output_len"] == 4
    assert "per token, ms" in done.stdout.splitlines()[1], "a table comes first"


def test_figures_are_kept_as_they_come(oracle: list[str], tmp_path: Path) -> None:
    """A turn that fails in its third case, and one that is cut off after its first figure."""
    file = tmp_path / "figures.jsonl"
    flags = [
        *oracle,
        "--max-model-len",
        "512",
        "--compare",
        "headrace",
        "--rounds",
        "1",
        "--results",
        str(file),
    ]
    began = time.monotonic()
    failed = bench("board", *flags, "--settle-seconds", "0", "--cases", "b1,b2,bx")
    enough = 3 * (time.monotonic() - began)  # for a start, on this machine and as busy as it is
    assert "headrace: exit code 1" in failed.stderr
    cut_off = bench("board", *flags, "--settle-seconds", "1000", "--timeout", f"{enough:.0f}")
    assert f"headrace: not done after {enough:.0f} s" in cut_off.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    start = "start to first token, s"
    assert [list(line["figures"]) for line in lines] == [[start], ["b1, ms"], ["b2, ms"], [start]]
    for done, names in ((failed, [start, "b1, ms", "b2, ms"]), (cut_off, [start])):
        assert done.returncode == 1
        assert list(json.loads(done.stdout.splitlines()[-1])["results"]["headrace"]) == names


def test_throughput_counts_every_token(oracle: list[str]) -> None:
    figures = results(bench("throughput", *oracle, "--workload", "nano", "--num-requests", "4"))
    told = figures["results"]["headrace"]
    assert told["output tokens/s"] < told["all tokens/s"]
    assert told["requests/s"] * told["wall, s"] == pytest.approx(4, rel=0.01)


def test_serving_does_not_wait_for_the_engine(oracle: list[str]) -> None:
    flags = ["--request-rate", "40", "--num-requests", "10", "--output-len", "4"]
    figures = results(bench("serving", *oracle, *flags))["results"]["headrace"]
    assert 0 < figures["TTFT p50, ms"] <= figures["E2E p50, ms"]


def test_oracle_names_each_process(oracle: list[str]) -> None:
    flags = ["--num-requests", "4", "--output-len", "64", "--no-detokenize"]
    figures = results(bench("oracle", *oracle[:2], *flags))["results"]["headrace"]
    assert {f"CPU per step: {role}, ms" for role in ("frontend", "core", "worker")} <= set(figures)
    assert figures["wall per step, ms"] > 0


def test_clients_of_the_server_get_exact_streams() -> None:
    """The script itself compares every token, over HTTP and without."""
    small = ["--num-clients", "30", "--output-len", "20", "--compare", "server,async_llm", "--rounds", "1"]
    told = results(bench("server", *small))["results"]
    assert set(told) == {"server", "async_llm"}
    assert all(figures["requests/s"] > 0 for figures in told.values())


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--compare", "headrace,other"], "'other' is not one of"),
        (["--engine", "other"], "invalid choice: 'other'"),
    ],
)
def test_an_unknown_engine_is_refused_at_once(flags: list[str], complaint: str) -> None:
    refused = bench("latency", *flags)
    assert refused.returncode == 2
    assert complaint in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="they would run")
@pytest.mark.parametrize(
    ("script", "needs"),
    [
        (["bench_kernels.py"], "needs 1 GPU; torch shows 0"),
        (["bench_all_reduce.py", "--ranks", "2"], "needs 2 GPUs; torch shows 0"),
        (["profile_step.py", "--model", str(SCRIPTS / "models" / "opt-125m")], "needs 1 GPU; torch shows 0"),
        (["sweep_medium_batch.py", "--out", "nowhere"], "needs 1 GPU; torch shows 0"),
    ],
)
def test_what_measures_gpus_says_so_where_there_are_none(script: list[str], needs: str) -> None:
    command = [sys.executable, str(SCRIPTS / script[0]), *script[1:]]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert refused.returncode == 2
    assert refused.stderr.rstrip().endswith(needs)
    assert "Traceback" not in refused.stderr


def test_scaling_over_frontends() -> None:
    done = bench("scaling", "--streams", "4", "--frontends", "2", "--output-len", "200", "--no-detokenize")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    figures = told["results"]["4"]
    assert figures["ITL p50, ms (the worst)"] > 0
    assert figures["core CPU per token, us"] > 0


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is installed")
def test_a_plot_without_matplotlib_is_refused_before_anything_runs(tmp_path: Path) -> None:
    refused = bench("latency", "--plot", str(tmp_path / "plot.png"))
    assert refused.returncode == 2
    assert "headrace[plot]" in refused.stderr
