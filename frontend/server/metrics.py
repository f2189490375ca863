"""GET /metrics: Prometheus' text form, vLLM's names. GET /stats: the engine at this moment, as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import prometheus_client.exposition
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from starlette.requests import Request
from starlette.responses import Response

from ..metrics import AnyMetric, Counter, Gauge, Histogram
from .endpoints import Endpoint
from .service import Service
from .streaming import json_response


class _Records:
    """Records in the form that prometheus_client writes; it asks for them by `collect`."""

    def __init__(self, records: Iterable[AnyMetric]) -> None:
        self._records = records

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for record in self._records:
            family = families.get(record.name)
            if family is None:
                family = families[record.name] = _family(record)
            _add(family, record)
        yield from families.values()


def _family(record: AnyMetric) -> Metric:
    match record:
        case Counter():
            return CounterMetricFamily(record.name, record.help, labels=list(record.labels))
        case Gauge():
            return GaugeMetricFamily(record.name, record.help, labels=list(record.labels))
        case Histogram():
            return HistogramMetricFamily(record.name, record.help, labels=list(record.labels))


def _add(family: Metric, record: AnyMetric) -> None:
    labels = list(record.labels.values())
    match family, record:
        case HistogramMetricFamily(), Histogram():
            family.add_metric(labels, list(record.buckets.items()), record.sum)
        case ((CounterMetricFamily() | GaugeMetricFamily()), (Counter() | Gauge())):
            family.add_metric(labels, record.value)


async def metrics(service: Service, request: Request, body: None) -> Response:
    own = service.engine.own_metrics()
    counted = own if service.board is None else service.board.total(own)
    records = [*await service.engine.get_engine_metrics(), *counted]
    text = prometheus_client.exposition.generate_latest(_Records(records))
    return Response(text, media_type=prometheus_client.exposition.CONTENT_TYPE_LATEST)


async def stats(service: Service, request: Request, body: None) -> Response:
    engine, clients = await service.engine.get_stats()
    return json_response(
        {
            "model": service.model,
            "max_model_len": service.engine.max_model_len,
            "engine": {name: getattr(engine, name) for name in engine.__struct_fields__},
            "clients": [
                {name: getattr(client, name) for name in client.__struct_fields__} for client in clients
            ],
        }
    )


ENDPOINTS = [
    Endpoint("GET", "/metrics", metrics, "Counters, gauges and histograms for Prometheus"),
    Endpoint("GET", "/stats", stats, "The engine and its clients at this moment"),
]
