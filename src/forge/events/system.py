"""What forge notices of itself: samples of resources, and the moments at which one crosses a line."""

from __future__ import annotations

from typing import Any, Literal

from forge.events.catalogue import Event, event

Level = Literal["warn", "clean", "full"]
"""Of a volume's use: somebody should look, the clean-up begins, no work is taken."""


@event("metric.sampled")
class MetricSampled(Event, frozen=True, kw_only=True):
    """One reading of a resource, kept for a while on the metrics stream."""

    metric_type: str
    value: int
    unit: str
    details: dict[str, Any]


@event("disk.crossed")
class DiskCrossed(Event, frozen=True, kw_only=True):
    """The use of the asset volume went over a line (``above``), or came back below it.

    One event for each crossing. From ``clean`` on the newest is said again from time to time while it stays
    so, because a clean-up may not have made enough room.
    """

    level: Level
    above: bool
    used_bytes: int
    limit_bytes: int
