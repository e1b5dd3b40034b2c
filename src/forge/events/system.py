"""The samples forge takes of itself."""

from __future__ import annotations

from typing import Any

from forge.events.catalogue import Event, event


@event("metric.sampled")
class MetricSampled(Event, frozen=True, kw_only=True):
    """One reading of a resource, kept for a while on the metrics stream."""

    metric_type: str
    value: int
    unit: str
    details: dict[str, Any]
