"""Numbers as OTLP has them: the families that Prometheus reads, in OpenTelemetry's words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

_CUMULATIVE = AggregationTemporality.CUMULATIVE
_UNKNOWN: Any = (None, None)
"""Least and greatest, which Prometheus does not keep."""


def data(families: Iterable[Family], resource: Resource, began: int) -> MetricsData:
    """What is so now; ``began`` is when counting began, in Unix nanoseconds."""
    now = time.time_ns()
    metrics = [metric for family in families if (metric := _metric(family, began, now))]
    scope = ScopeMetrics(InstrumentationScope("forge"), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(family: Family, began: int, now: int) -> Metric | None:
    samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    if not samples:
        return None
    points: Any
    match family.type:
        case "counter":
            points = Sum([_number(s, began, now) for s in samples], _CUMULATIVE, True)
        case "histogram":
            points = Histogram(list(_histograms(samples, began, now)), _CUMULATIVE)
        case _:
            points = Gauge([_number(s, 0, now) for s in samples])
    name = samples[0].name if family.type == "counter" else family.name
    return Metric(name, family.documentation, "", points)


def _number(sample: Sample, began: int, now: int) -> NumberDataPoint:
    return NumberDataPoint(sample.labels, began, now, sample.value)


def _histograms(samples: Sequence[Sample], began: int, now: int) -> Iterator[HistogramDataPoint]:
    """One point for each set of labels; its samples stand side by side, buckets first, and they add up."""

    def labels(sample: Sample) -> dict[str, str]:
        return {name: value for name, value in sample.labels.items() if name != "le"}

    for of, mine in groupby(samples, key=labels):
        bounds, counts, total = list[float](), list[int](), 0.0
        for sample in mine:
            if sample.name.endswith("_bucket"):
                bounds.append(float(sample.labels["le"]))
                counts.append(int(sample.value))
            elif sample.name.endswith("_sum"):
                total = sample.value
        each = [count - before for count, before in zip(counts, [0, *counts], strict=False)]
        yield HistogramDataPoint(of, began, now, counts[-1], total, each, bounds[:-1], *_UNKNOWN)
