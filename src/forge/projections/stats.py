"""``generation_stats``: what came of jobs, by hour, type and outcome, with durations in fine buckets."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime

import asyncpg

from forge.database import Connection
from forge.events.envelope import Recorded
from forge.events.jobs import JobCancelled, JobCompleted, JobFailed, JobSubmitted
from forge.projections.projection import Add, Change, Projection, Table

TABLE = Table("generation_stats", ("hour", "job_type", "outcome", "duration_bucket"))
stats = Projection("stats", version=1, tables=[TABLE])

_STEPS = 12
"""Buckets in a doubling: a percentile is read back to within 3 %."""


def bucket(milliseconds: int) -> int:
    """The bucket of a duration, 0 for none."""
    return 0 if milliseconds <= 0 else 1 + round(_STEPS * math.log2(milliseconds))


def milliseconds(bucket_: int) -> float:
    """The middle of a bucket."""
    return 0.0 if bucket_ <= 0 else float(2 ** ((bucket_ - 1) / _STEPS))


def _count(
    record: Recorded, job_type: str, outcome: str, run_ms: int = 0, waited_ms: int = 0
) -> Iterable[Change]:
    hour = record.meta.at.replace(minute=0, second=0, microsecond=0)
    key = {"hour": hour, "job_type": job_type, "outcome": outcome, "duration_bucket": bucket(run_ms)}
    yield Add(TABLE, key, {"jobs": 1, "run_ms": run_ms, "waited_ms": waited_ms})


@stats.on(JobSubmitted)
def submitted(event: JobSubmitted, record: Recorded) -> Iterable[Change]:
    return _count(record, event.job_type, "submitted")


@stats.on(JobCompleted)
def completed(event: JobCompleted, record: Recorded) -> Iterable[Change]:
    outcome = "cached" if event.cached else "completed"
    return _count(record, event.job_type, outcome, event.run_ms, event.waited_ms)


@stats.on(JobFailed)
def failed(event: JobFailed, record: Recorded) -> Iterable[Change]:
    return _count(record, event.job_type, "failed")


@stats.on(JobCancelled)
def cancelled(event: JobCancelled, record: Recorded) -> Iterable[Change]:
    return _count(record, event.job_type, "cancelled")


# -------------------------------------------------------------------- reading

_OUTCOMES = """
select job_type, outcome, duration_bucket, sum(jobs)::bigint as jobs, sum(run_ms)::bigint as run_ms,
       sum(waited_ms)::bigint as waited_ms
from generation_stats where hour >= $1
group by job_type, outcome, duration_bucket order by job_type, duration_bucket
"""


async def outcomes(connection: Connection, since: datetime) -> list[asyncpg.Record]:
    """Jobs by type, outcome and bucket of duration, in the hours that began at ``since`` or later."""
    return await connection.fetch(_OUTCOMES, since)


def percentile(buckets: Iterable[tuple[int, int]], part: float) -> float | None:
    """The duration in milliseconds that ``part`` of the jobs stayed within; None of none.

    ``buckets`` are pairs of bucket and jobs, shortest first.
    """
    counted = [(bucket_, jobs) for bucket_, jobs in buckets if jobs > 0]
    wanted = part * sum(jobs for _, jobs in counted)
    reached = 0
    for bucket_, jobs in counted:
        reached += jobs
        if reached >= wanted:
            return milliseconds(bucket_)
    return None
