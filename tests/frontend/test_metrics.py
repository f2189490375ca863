"""What a frontend counts, and the names under which dashboards find it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from headrace.frontend.metrics import Counter, FrontendMetrics, Gauge, Histogram, engine_records
from headrace.frontend.request_table import RequestTable
from headrace.frontend.requests import Request
from headrace.frontend.sampling_params import RequestOutputKind
from headrace.ipc.config import EngineConfig
from headrace.ipc.errors import EngineDeadError, ErrorInfo
from headrace.ipc.messages import ClientStats, Finished, FinishReason, Started, Stats, StepOutputs, pack

LABELS = {"model_name": "m", "engine": "0"}


def histogram(metrics: FrontendMetrics, name: str) -> Histogram:
    found = [record for record in metrics.records(LABELS) if record.name == f"vllm:{name}"]
    assert isinstance(found[0], Histogram)
    return found[0]


def counter(metrics: FrontendMetrics, name: str, **labels: str) -> int:
    return sum(
        record.value
        for record in metrics.records(LABELS)
        if isinstance(record, Counter) and record.name == f"vllm:{name}" and record.labels == LABELS | labels
    )


def add(table: RequestTable, name: str, n: int = 1) -> Request:
    request = Request(name, None, [1, 2, 3], RequestOutputKind.DELTA, False, table.metrics)
    table.reserve(request)
    request.begin([None] * n, [None] * n, 0, max_tokens=7)
    table.number(request)
    return request


def step(table: RequestTable, numbers: list[int], started: int | None = None, *ends: Finished) -> None:
    news = [] if started is None else [Started(started, 2, 0.5)]
    table.apply(StepOutputs(pack(numbers), pack(numbers), news, list(ends)))


def test_the_names_that_dashboards_know(make_config: Callable[..., EngineConfig]) -> None:
    stats = Stats(num_blocks=4, num_free_blocks=1, steps_by_tokens=[0] * 14)
    engine = list(engine_records(make_config(), stats, [ClientStats("c")], LABELS))
    assert {(type(record), record.name) for record in engine} == {
        (Gauge, "vllm:num_requests_running"),
        (Gauge, "vllm:num_requests_waiting"),
        (Gauge, "vllm:num_requests_waiting_by_reason"),
        (Gauge, "vllm:kv_cache_usage_perc"),
        (Counter, "vllm:num_preemptions"),
        (Counter, "vllm:prefix_cache_queries"),
        (Counter, "vllm:prefix_cache_hits"),
        (Counter, "headrace:num_worker_restarts"),
        (Counter, "headrace:num_replays"),
        (Gauge, "vllm:engine_sleep_state"),
        (Gauge, "vllm:cache_config_info"),
        (Histogram, "vllm:iteration_tokens_total"),
        (Gauge, "headrace:client_requests_running"),
        (Gauge, "headrace:client_requests_waiting"),
        (Gauge, "headrace:client_kv_blocks"),
        (Counter, "headrace:client_generation_tokens"),
    }
    assert [r.value for r in engine if isinstance(r, Gauge)][:3] == [0, 0, 0.75]
    metrics = FrontendMetrics()
    metrics.completed("stop")
    assert {record.name.removeprefix("vllm:") for record in metrics.records(LABELS)} == {
        "prompt_tokens",
        "prompt_tokens_cached",
        "prompt_tokens_by_source",
        "generation_tokens",
        "request_success",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
        "request_prefill_kv_computed_tokens",
    }


@pytest.mark.parametrize("brought", [[], [0]])
def test_a_replay_leaves_the_queue_again_and_counts_no_more(brought: list[int]) -> None:
    table = RequestTable()
    request = add(table, "a")
    step(table, brought, 0)
    step(table, [], 0)
    assert counter(table.metrics, "prompt_tokens") == 3
    assert counter(table.metrics, "prompt_tokens_cached") == 2
    assert request.num_cached_tokens == 2


def test_a_requests_times_and_sizes() -> None:
    metrics = FrontendMetrics()
    metrics.request_ended(
        num_prompt_tokens=3,
        nums_generated=[5, 2],
        max_tokens=7,
        arrived=10.0,
        scheduled=10.5,
        first_token=11.5,
        last_token=13.5,
        now=14.0,
    )
    for name, value in (
        ("e2e_request_latency_seconds", 4.0),
        ("request_queue_time_seconds", 0.5),
        ("request_inference_time_seconds", 3.0),
        ("request_prefill_time_seconds", 1.0),
        ("request_decode_time_seconds", 2.0),
        ("request_time_per_output_token_seconds", 0.5),
        ("request_prompt_tokens", 3),
        ("request_generation_tokens", 7),
        ("request_max_num_generation_tokens", 5),
        ("request_params_n", 2),
        ("request_params_max_tokens", 7),
    ):
        found = histogram(metrics, name)
        assert (found.count, found.sum) == (1, value)
        counted = {float(bound) for bound, count in found.buckets.items() if count}
        assert counted == {bound for bound in map(float, found.buckets) if value <= bound}


def test_completions_of_one_request() -> None:
    """Each may find more or less in the cache, and end before the others fail."""
    table = RequestTable()
    request = add(table, "a", n=3)
    for number, num_cached in enumerate((0, 2, 1)):
        table.apply(StepOutputs(b"", b"", [Started(number, num_cached, 0.5)]))
    assert request.num_cached_tokens == 2
    step(table, [], None, Finished(1, FinishReason.STOP))
    table.fail_all(EngineDeadError("gone"))
    assert counter(table.metrics, "request_success", finished_reason="stop") == 1
    assert counter(table.metrics, "request_success", finished_reason="error") == 2


def test_a_request_is_counted_once_in_everything() -> None:
    table = RequestTable()
    add(table, "a", n=2)
    step(table, [0, 1], 0)
    step(table, [0, 1])
    step(table, [0], None, Finished(0, FinishReason.STOP), Finished(1, FinishReason.LENGTH))
    metrics = table.metrics
    assert counter(metrics, "prompt_tokens") == 3
    assert counter(metrics, "prompt_tokens_cached") == 2
    assert counter(metrics, "prompt_tokens_by_source", source="local_cache_hit") == 2
    assert counter(metrics, "prompt_tokens_by_source", source="local_compute") == 1
    assert counter(metrics, "generation_tokens") == 5
    assert counter(metrics, "request_success", finished_reason="stop") == 1
    assert counter(metrics, "request_success", finished_reason="length") == 1
    for name, count, total in (
        ("inter_token_latency_seconds", 3, None),
        ("time_to_first_token_seconds", 1, None),
        ("e2e_request_latency_seconds", 1, None),
        ("request_generation_tokens", 1, 5),
        ("request_max_num_generation_tokens", 1, 3),
        ("request_params_n", 1, 2),
        ("request_params_max_tokens", 1, 7),
        ("request_prefill_kv_computed_tokens", 1, 1),
    ):
        found = histogram(metrics, name)
        assert found.count == count, name
        assert total is None or found.sum == total, name


@pytest.mark.parametrize("how", ["abort", "error", "death"])
def test_ends_that_are_not_the_model_s(how: str) -> None:
    table = RequestTable()
    request = add(table, "a")
    step(table, [0], 0)
    if how == "abort":
        table.drop(request)
        request.abort()
    elif how == "error":
        step(table, [], None, Finished(0, FinishReason.ERROR, error=ErrorInfo("request", "no")))
    else:
        table.fail_all(EngineDeadError("gone"))
    reason = "abort" if how == "abort" else "error"
    assert counter(table.metrics, "request_success", finished_reason=reason) == 1
    assert histogram(table.metrics, "e2e_request_latency_seconds").count == 1
    assert histogram(table.metrics, "request_decode_time_seconds").count == 1


def test_a_request_that_was_never_sent_counts_nowhere() -> None:
    table = RequestTable()
    request = Request("a", None, [1], RequestOutputKind.DELTA, False, table.metrics)
    table.reserve(request)
    table.drop(request)
    assert histogram(table.metrics, "e2e_request_latency_seconds").count == 0


def test_buckets_are_cumulative_and_bounds_belong_to_them() -> None:
    metrics = FrontendMetrics()
    for seconds in (0.0001, 0.001, 0.0011, 1000.0):
        metrics.gap(seconds)
    found = histogram(metrics, "inter_token_latency_seconds")
    assert (found.buckets["0.0002"], found.buckets["0.001"], found.buckets["0.0015"]) == (1, 2, 3)
    assert (found.buckets["80"], found.buckets["+Inf"], found.count) == (3, 4, 4)
    assert found.sum == pytest.approx(1000.0022)


@pytest.mark.parametrize(("level", "state"), [(None, "awake"), (1, "weights_offloaded"), (2, "discard_all")])
def test_sleep(make_config: Callable[..., EngineConfig], level: int | None, state: str) -> None:
    stats = Stats(sleep_level=level, steps_by_tokens=[0] * 14)
    found = {
        record.labels["sleep_state"]: record.value
        for record in engine_records(make_config(), stats, [], LABELS)
        if isinstance(record, Gauge) and record.name == "vllm:engine_sleep_state"
    }
    assert found == {name: name == state for name in ("awake", "weights_offloaded", "discard_all")}


def test_the_dashboard_asks_for_metrics_that_exist(make_config: Callable[..., EngineConfig]) -> None:
    stats = Stats(steps_by_tokens=[0] * 14)
    dashboard = Path(__file__).parents[2] / "examples" / "deploy" / "grafana-dashboard.json"
    metrics = FrontendMetrics()
    metrics.completed("stop")
    known: set[str] = set()
    for record in [*metrics.records(LABELS), *engine_records(make_config(), stats, [], LABELS)]:
        suffixes = {Counter: ["_total"], Gauge: [""], Histogram: ["_bucket"]}[type(record)]
        known |= {record.name + suffix for suffix in suffixes}
    asked = set(re.findall(r"vllm:\w+", dashboard.read_text()))
    assert len(asked) > 10
    assert asked <= known
