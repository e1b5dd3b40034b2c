"""Where each waiting job stands in the line."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

from forge.domain.dispatch import Line
from forge.domain.jobs import Status

_EXACT = 100
_STALE_SECONDS = 0.5
_REST = 50


def utc() -> datetime:
    return datetime.now(UTC)


class Places:
    """Positions in the line, 1 for the next job.

    Exact while few wait. Counting a long line takes milliseconds, so it is counted again only after it has
    rested fifty times as long as the count took.
    """

    def __init__(self, line: Line, clock: Callable[[], datetime] = utc) -> None:
        self._line, self._clock = line, clock
        self._version = -1
        self._made = self._cost = 0.0
        self._places: dict[UUID, int] = {}

    def of(self, job_id: UUID) -> int | None:
        """One job's place; the end of the line for one that joined since it was last counted."""
        self._count_if_due()
        place = self._places.get(job_id)
        if place is not None:
            return place
        job = self._line.jobs.get(job_id)
        joined = job is not None and job.status is Status.PENDING and job.retry_at is None
        return self._line.pending if joined else None

    def _count_if_due(self) -> None:
        line, now = self._line, time.monotonic()
        age = now - self._made
        exact = line.pending <= _EXACT and line.version != self._version
        if exact or age > max(_STALE_SECONDS, _REST * self._cost):
            line.release(self._clock())
            self._places = {job_id: nth for nth, job_id in enumerate(line.order(), 1)}
            self._version, self._made = line.version, now
            self._cost = time.monotonic() - now
