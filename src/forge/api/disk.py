"""The asset volume as ``GET /stats`` tells it: where it is, how fast it grows, when its lines are reached."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from forge.api.schemas import DiskStats
from forge.database import Connection
from forge.domain.disk import LEVELS, Disk, Lines, rank
from forge.domain.forecast import growth, reaches
from forge.events.system import Level
from forge.projections import usage

METRIC = "disk_usage"
_LEVELS: tuple[Literal["ok"] | Level, ...] = ("ok", *LEVELS)

_POINTS = 120
"""Means that the growth is read from; its time goes with the square of that."""


async def disk_stats(
    connection: Connection, lines: Lines, since: datetime, now: datetime
) -> DiskStats | None:
    """The newest sample, and the growth since ``since``; None before the first sample."""
    newest = await usage.latest(connection, METRIC)
    if newest is None:
        return None
    used, details = newest["metric_value"], newest["details"]
    limit = int(details.get("limit", 0))
    disk = Disk(used, limit, int(details.get("free", max(0, limit - used))))
    step = max(1, int((now - since).total_seconds() / _POINTS))
    points = await usage.steps(connection, METRIC, since, None, None, step, _POINTS)
    pace = growth([(point["timestamp"], float(point["metric_value"])) for point in points])
    return DiskStats(
        sampled_at=newest["timestamp"],
        used_bytes=disk.used,
        limit_bytes=disk.limit,
        free_bytes=disk.free,
        level=_LEVELS[rank(disk, lines)],
        bytes_by_type=details.get("by_type", {}),
        growth_bytes_per_hour=None if pace is None else round(pace * 3600, 1),
        warn_at=reaches(lines.warn * limit, now, used, pace),
        clean_at=reaches(lines.clean * limit, now, used, pace),
    )
