"""What a frontend measures about its own requests: counters and histograms in vLLM's names. Pure.

Accumulated in plain lists, because some of it happens for every token; made into `Metric` records when
somebody asks, for `LLM.get_metrics` and for Prometheus alike.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

import msgspec

from ..ipc.config import EngineConfig
from ..ipc.messages import STEP_TOKENS, ClientStats, Stats

# vLLM's bounds with finer ones below 10 ms, where a fast model's tokens are.
_FIRST_TOKEN = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN = (
    *(0.0002, 0.0003, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015),
    *(0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0),
    *(15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(mantissa * 10**power) for power in range(6) for mantissa in (1, 2, 5))
_COUNT = (1.0, 2.0, 5.0, 10.0, 20.0)

_HISTOGRAMS: dict[str, tuple[Sequence[float], str]] = {
    "time_to_first_token_seconds": (_FIRST_TOKEN, "From a request's arrival to its first token."),
    "inter_token_latency_seconds": (_PER_TOKEN, "Between two tokens of a completion."),
    "request_time_per_output_token_seconds": (_PER_TOKEN, "A request's mean time per token after the first."),
    "e2e_request_latency_seconds": (_REQUEST, "From a request's arrival to its end."),
    "request_queue_time_seconds": (_REQUEST, "From a request's arrival to its first step."),
    "request_inference_time_seconds": (_REQUEST, "From a request's first step to its last token."),
    "request_prefill_time_seconds": (_REQUEST, "From a request's first step to its first token."),
    "request_decode_time_seconds": (_REQUEST, "From a request's first token to its last."),
    "request_prompt_tokens": (_TOKENS, "Prompt tokens of a request."),
    "request_generation_tokens": (_TOKENS, "Generated tokens of a request."),
    "request_max_num_generation_tokens": (_TOKENS, "Generated tokens of a request's longest completion."),
    "request_params_n": (_COUNT, "The parameter n of a request."),
    "request_params_max_tokens": (_TOKENS, "The parameter max_tokens of a request, if it had one."),
    "request_prefill_kv_computed_tokens": (_TOKENS, "Prompt tokens of a request that no cache held."),
}


class Metric(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One figure by its Prometheus name, without the suffixes that Prometheus adds."""

    name: str
    help: str
    labels: dict[str, str] = {}


class Counter(Metric, frozen=True):
    """It only grows."""

    value: int


class Gauge(Metric, frozen=True):
    """It goes up and down."""

    value: float


class Histogram(Metric, frozen=True):
    """How often values fell below each bound."""

    count: int
    sum: float
    buckets: dict[str, int]
    """Upper bound, in text, to the number of values at most that large; the last is "+Inf"."""


AnyMetric: TypeAlias = Counter | Gauge | Histogram


class _Buckets:
    """A histogram that grows."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class FrontendMetrics:
    """Grows with each request of one frontend; `records` tells how far it has come."""

    def __init__(self) -> None:
        self._histograms = {name: _Buckets(bounds) for name, (bounds, _) in _HISTOGRAMS.items()}
        self._gaps = self._histograms["inter_token_latency_seconds"]
        self._ends: Tally[str] = Tally()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._generation_tokens = 0

    def first_token(self, seconds: float) -> None:
        """A request got its first token `seconds` after its arrival."""
        self._histograms["time_to_first_token_seconds"].observe(seconds)

    def gap(self, seconds: float) -> None:
        """A completion got its next token `seconds` after the one before. Called for every token."""
        gaps = self._gaps
        gaps.counts[bisect_left(gaps.bounds, seconds)] += 1
        gaps.sum += seconds

    def completed(self, reason: str) -> None:
        """A completion ended; `reason` is its finish_reason, or "error"."""
        self._ends[reason] += 1

    def started(self, num_prompt_tokens: int, num_cached_tokens: int) -> None:
        """A request left the queue."""
        self._prompt_tokens += num_prompt_tokens
        self._cached_tokens += num_cached_tokens
        self._observe(request_prefill_kv_computed_tokens=num_prompt_tokens - num_cached_tokens)

    def generated(self, count: int) -> None:
        """So many tokens came."""
        self._generation_tokens += count

    def request_ended(
        self,
        *,
        num_prompt_tokens: int,
        nums_generated: Sequence[int],
        max_tokens: int | None,
        arrived: float,
        scheduled: float,
        first_token: float,
        last_token: float,
        now: float,
    ) -> None:
        """A request ended, in whatever way. Moments in seconds of one clock, 0.0 for what did not happen.

        `nums_generated` has the number of tokens of each completion.
        """
        longest = max(nums_generated)
        self._observe(
            e2e_request_latency_seconds=now - arrived,
            request_prompt_tokens=num_prompt_tokens,
            request_generation_tokens=sum(nums_generated),
            request_max_num_generation_tokens=longest,
            request_params_n=len(nums_generated),
        )
        if max_tokens is not None:
            self._observe(request_params_max_tokens=max_tokens)
        if scheduled:
            self._observe(request_queue_time_seconds=scheduled - arrived)
        if first_token:
            self._observe(
                request_inference_time_seconds=last_token - scheduled,
                request_prefill_time_seconds=first_token - scheduled,
                request_decode_time_seconds=last_token - first_token,
            )
        if longest > 1:
            self._observe(request_time_per_output_token_seconds=(last_token - first_token) / (longest - 1))

    def records(self, labels: dict[str, str]) -> Iterator[AnyMetric]:
        """All of it, under these labels."""
        for name, value, text in (
            ("prompt_tokens", self._prompt_tokens, "Prompt tokens of requests that have left the queue."),
            ("prompt_tokens_cached", self._cached_tokens, "Of these, tokens found in the prefix cache."),
            ("generation_tokens", self._generation_tokens, "Generated tokens."),
        ):
            yield Counter(name=f"vllm:{name}", help=text, labels=labels, value=value)
        computed = self._prompt_tokens - self._cached_tokens
        for source, value in (("local_compute", computed), ("local_cache_hit", self._cached_tokens)):
            yield Counter(
                name="vllm:prompt_tokens_by_source",
                help="Prompt tokens of requests that have left the queue, by where their KV came from.",
                labels=labels | {"source": source},
                value=value,
            )
        for reason, count in sorted(self._ends.items()):
            yield Counter(
                name="vllm:request_success",
                help="Completions that ended, by how.",
                labels=labels | {"finished_reason": reason},
                value=count,
            )
        for name, buckets in self._histograms.items():
            yield _histogram(name, _HISTOGRAMS[name][1], labels, buckets.bounds, buckets.counts, buckets.sum)

    def _observe(self, **values: float) -> None:
        for name, value in values.items():
            self._histograms[name].observe(value)


def core_restarts(count: int, labels: dict[str, str]) -> Counter:
    """How often this frontend lost its engine core and found it again."""
    text = "Engine cores that were lost and came back."
    return Counter(name="headrace:num_core_restarts", help=text, labels=labels, value=count)


def engine_records(
    config: EngineConfig, stats: Stats, clients: Sequence[ClientStats], labels: dict[str, str]
) -> Iterator[AnyMetric]:
    """What the engine core tells about itself: all its clients together, then each."""
    used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
    for name, amount, text in (
        ("num_requests_running", stats.num_running, "Requests that hold a slot."),
        ("num_requests_waiting", stats.num_waiting, "Requests in the queue."),
        ("kv_cache_usage_perc", used, "Share of KV blocks in use, 0 to 1."),
    ):
        yield Gauge(name=f"vllm:{name}", help=text, labels=labels, value=amount)
    # Nothing is deferred for other reasons than a lack of slots, blocks or budget.
    for reason, amount in (("capacity", stats.num_waiting), ("deferred", 0)):
        yield Gauge(
            name="vllm:num_requests_waiting_by_reason",
            help="Requests in the queue, by why they wait.",
            labels=labels | {"reason": reason},
            value=amount,
        )
    for state, level in (("awake", None), ("weights_offloaded", 1), ("discard_all", 2)):
        yield Gauge(
            name="vllm:engine_sleep_state",
            help="1 for the state that it is in.",
            labels=labels | {"sleep_state": state},
            value=stats.sleep_level == level,
        )
    yield _cache_config(config, stats, labels)
    for name, count, text in (
        ("num_preemptions", stats.num_preemptions, "Requests put back into the queue for their blocks."),
        ("prefix_cache_queries", stats.prefix_cache_queries, "Prompt tokens looked up in the prefix cache."),
        ("prefix_cache_hits", stats.prefix_cache_hits, "Prompt tokens found in the prefix cache."),
    ):
        yield Counter(name=f"vllm:{name}", help=text, labels=labels, value=count)
    yield _histogram(
        "iteration_tokens_total",
        "Tokens of a step.",
        labels,
        STEP_TOKENS,
        stats.steps_by_tokens,
        stats.step_tokens,
    )
    for name, count, text in (
        ("num_worker_restarts", stats.num_restarts, "Workers started again after a fault, by this core."),
        ("num_replays", stats.num_replays, "Requests run again after a fault, by this core."),
    ):
        yield Counter(name=f"headrace:{name}", help=text, labels=labels, value=count)
    for client in clients:
        yield from _client_records(client, labels | {"client": client.name, "client_id": str(client.id)})


def _cache_config(config: EngineConfig, stats: Stats, labels: dict[str, str]) -> Gauge:
    facts = {
        "block_size": config.block_size,
        "cache_dtype": config.dtype,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": config.kv_cache_memory_bytes,
        "num_gpu_blocks": stats.num_blocks,
        "num_gpu_blocks_override": config.num_gpu_blocks_override,
    }
    about = labels | {name: str(value) for name, value in facts.items()}
    return Gauge(name="vllm:cache_config_info", help="The KV cache, in the labels.", labels=about, value=1)


def _client_records(client: ClientStats, labels: dict[str, str]) -> Iterator[AnyMetric]:
    for name, level, text in (
        ("client_requests_running", client.num_running, "A client's requests that hold a slot."),
        ("client_requests_waiting", client.num_waiting, "A client's requests in the queue."),
        ("client_kv_blocks", client.num_blocks, "KV blocks of a client's requests."),
    ):
        yield Gauge(name=f"headrace:{name}", help=text, labels=labels, value=level)
    yield Counter(
        name="headrace:client_generation_tokens",
        help="Tokens generated for a client.",
        labels=labels,
        value=client.generation_tokens,
    )


def _histogram(
    name: str, text: str, labels: dict[str, str], bounds: Sequence[float], counts: Sequence[int], total: float
) -> Histogram:
    """`counts`: of values up to each bound and beyond the one before; the last beyond all."""
    names = [*(f"{bound:.12g}" for bound in bounds), "+Inf"]
    return Histogram(
        name=f"vllm:{name}",
        help=text,
        labels=labels,
        count=sum(counts),
        sum=total,
        buckets=dict(zip(names, accumulate(counts), strict=True)),
    )
