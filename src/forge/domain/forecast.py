"""How fast something grows, and when it gets somewhere: Theil–Sen, which a few odd samples do not bend."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import combinations
from statistics import median

MIN_SAMPLES = 5
FURTHEST = timedelta(days=3650)
"""Nothing is foretold beyond ten years."""

Sample = tuple[datetime, float]


def growth(samples: Sequence[Sample]) -> float | None:
    """The median slope between all pairs of samples, in units a second; None of fewer than five.

    Takes time with the square of their number: give it some hundred at most.
    """
    if len(samples) < MIN_SAMPLES:
        return None
    slopes = [
        (later[1] - earlier[1]) / seconds
        for earlier, later in combinations(sorted(samples), 2)
        if (seconds := (later[0] - earlier[0]).total_seconds()) > 0
    ]
    return median(slopes) if slopes else None


def reaches(line: float, now: datetime, value: float, per_second: float | None) -> datetime | None:
    """When ``value`` gets to ``line`` at this pace: ``now`` where it is there; None where it never does."""
    if value >= line:
        return now
    if per_second is None or per_second <= 0:
        return None
    seconds = (line - value) / per_second
    return now + timedelta(seconds=seconds) if seconds <= FURTHEST.total_seconds() else None
