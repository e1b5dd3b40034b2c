"""``generation_queue`` (D2): every job, as the log tells it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from forge.database import Connection
from forge.domain.jobs import Status
from forge.events.envelope import Recorded
from forge.events.jobs import (
    JobAdopted,
    JobAttemptFailed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobRedirected,
    JobRetried,
    JobStarted,
    JobSubmitted,
)
from forge.projections.projection import Change, Create, Projection, Put, Table

TABLE = Table("generation_queue", ("id",))
queue = Projection("queue", version=1, tables=[TABLE])

_UNLOCKED: dict[str, Any] = {"locked_by": None, "locked_at": None}


def _put(record: Recorded, job_id: UUID, **columns: Any) -> list[Change]:
    return [Put(TABLE, {"id": job_id, **columns, "seq": record.seq})]


@queue.on(JobSubmitted)
def submitted(event: JobSubmitted, record: Recorded) -> Iterable[Change]:
    yield Create(
        TABLE,
        {
            "id": event.job_id,
            "priority": event.priority,
            "job_type": event.job_type,
            "asset_type": event.asset_type,
            "job_params": event.params,
            "status": Status.PENDING,
            "attempts": 0,
            "max_attempts": event.max_attempts,
            "created_at": record.meta.at,
            "user_id": event.user_id,
            "session_id": event.session_id,
            "character_id": event.character_id,
            "batch_id": event.batch_id,
            "ttl_seconds": event.ttl_seconds,
            "regenerates": event.regenerates.asset_id if event.regenerates else None,
            "cached": False,
            "assets": [],
            "submitted_seq": record.seq,
            "admitted_seq": record.seq,
            "seq": record.seq,
        },
    )


@queue.on(JobRetried)
def retried(event: JobRetried, record: Recorded) -> Iterable[Change]:
    return _put(
        record,
        event.job_id,
        status=Status.PENDING,
        max_attempts=event.max_attempts,
        admitted_seq=record.seq,
        completed_at=None,
        error_code=None,
        error_message=None,
    )


@queue.on(JobStarted)
def started(event: JobStarted, record: Recorded) -> Iterable[Change]:
    return _put(
        record,
        event.job_id,
        status=Status.RUNNING,
        attempts=event.attempt,
        locked_by=event.worker,
        locked_at=record.meta.at,
        started_at=record.meta.at,
        retry_at=None,
        backend=event.backend,
        reason=event.reason,
        error_code=None,
        error_message=None,
    )


@queue.on(JobAdopted)
def adopted(event: JobAdopted, record: Recorded) -> Iterable[Change]:
    return _put(record, event.job_id, locked_by=event.worker, locked_at=record.meta.at)


@queue.on(JobRedirected)
def redirected(event: JobRedirected, record: Recorded) -> Iterable[Change]:
    return _put(record, event.job_id, backend=event.backend)


@queue.on(JobAttemptFailed)
def attempt_failed(event: JobAttemptFailed, record: Recorded) -> Iterable[Change]:
    return _put(
        record,
        event.job_id,
        status=Status.PENDING,
        error_code=event.code,
        error_message=event.message,
        retry_at=event.retry_at,
        **_UNLOCKED,
    )


@queue.on(JobCompleted)
def completed(event: JobCompleted, record: Recorded) -> Iterable[Change]:
    return _put(
        record,
        event.job_id,
        status=Status.COMPLETED,
        completed_at=record.meta.at,
        cached=event.cached,
        assets=event.assets,
        regenerated=event.regenerated,
        **_UNLOCKED,
    )


@queue.on(JobFailed)
def failed(event: JobFailed, record: Recorded) -> Iterable[Change]:
    return _put(
        record,
        event.job_id,
        status=Status.FAILED,
        completed_at=record.meta.at,
        error_code=event.code,
        error_message=event.message,
        **_UNLOCKED,
    )


@queue.on(JobCancelled)
def cancelled(event: JobCancelled, record: Recorded) -> Iterable[Change]:
    return _put(
        record, event.job_id, status=Status.CANCELLED, completed_at=record.meta.at, retry_at=None, **_UNLOCKED
    )


# -------------------------------------------------------------------- reading
# A tenant of null is an operator, who sees everybody's.


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs a list holds; None does not matter."""

    statuses: tuple[Status, ...] = tuple(Status)
    job_type: str | None = None
    session_id: str | None = None
    character_id: str | None = None
    batch_id: UUID | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


_COLUMNS = """
select id, status, job_type, job_params, priority, user_id, session_id, character_id, batch_id, attempts,
       max_attempts, created_at, started_at, completed_at, error_code, error_message, cached, assets,
       submitted_seq, admitted_seq, seq, regenerates, regenerated
from generation_queue
"""

_JOB = f"{_COLUMNS} where id = $1 and ($2::text is null or user_id = $2)"

_REGENERATING = f"{_COLUMNS} where regenerates = $1 and ($2::text is null or user_id = $2) order by seq"

_BATCH = f"{_COLUMNS} where batch_id = $1 and ($2::text is null or user_id = $2) order by submitted_seq"

_PAGE = f"""{_COLUMNS}
where ($1::text is null or user_id = $1)
  and status = any ($2::text[])
  and ($3::text is null or job_type = $3)
  and ($4::text is null or session_id = $4)
  and ($5::text is null or character_id = $5)
  and ($6::uuid is null or batch_id = $6)
  and ($7::timestamptz is null or created_at > $7)
  and ($8::timestamptz is null or created_at < $8)
  and ($9::timestamptz is null or (created_at, id) < ($9, $10::uuid))
order by created_at desc, id desc
limit $11
"""

_COUNTS = """
select s.status, (
    select count(*) from (
        select from generation_queue q
        where q.status = s.status and ($1::text is null or q.user_id = $1) limit 10001
    ) c
) as jobs
from unnest($2::text[]) as s (status)
"""


_RUNNING = """
select id, user_id, job_type, priority, attempts, locked_by, backend,
       coalesce(extract(epoch from clock_timestamp() - started_at), 0)::float8 as seconds
from generation_queue where status = 'running' order by started_at, id limit $1
"""

_WAITING = """
select grouping(user_id) = 0 as of_user, coalesce(user_id, job_type) as name, count(*) as jobs,
       count(*) filter (where retry_at > clock_timestamp()) as backing_off,
       coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::float8 as oldest
from generation_queue where status = 'pending'
group by grouping sets ((user_id), (job_type), ())
"""

_DUE = """
select jobs, coalesce(extract(epoch from clock_timestamp() - since), 0)::float8 as oldest from (
    select count(*) as jobs, min(coalesce(retry_at, created_at)) as since from generation_queue
    where status = 'pending' and (retry_at is null or retry_at <= clock_timestamp())
) due
"""


async def running(connection: Connection, limit: int) -> list[asyncpg.Record]:
    """Jobs that run and for how many seconds, the longest first."""
    return await connection.fetch(_RUNNING, limit)


async def waiting(connection: Connection) -> list[asyncpg.Record]:
    """Jobs that wait: by user, by job type, and (with no name) all; how many are in back-off, and seconds
    since the oldest was asked for."""
    return await connection.fetch(_WAITING)


async def due(connection: Connection) -> tuple[int, float]:
    """How many jobs wait whose turn could come now, and for how many seconds the first of them could."""
    [row] = await connection.fetch(_DUE)
    return row["jobs"], row["oldest"]


async def job(connection: Connection, id_: UUID, tenant: str | None) -> asyncpg.Record | None:
    """One job, if the tenant may see it."""
    return await connection.fetchrow(_JOB, id_, tenant)


async def regenerating(connection: Connection, asset_id: UUID, tenant: str | None) -> list[asyncpg.Record]:
    """The jobs that were to draw an asset again."""
    return await connection.fetch(_REGENERATING, asset_id, tenant)


async def batch(connection: Connection, id_: UUID, tenant: str | None) -> list[asyncpg.Record]:
    """The jobs of a batch in the order they were given; none where there is no such batch."""
    return await connection.fetch(_BATCH, id_, tenant)


async def page(
    connection: Connection,
    tenant: str | None,
    wanted: Wanted,
    after: tuple[datetime, UUID] | None,
    limit: int,
) -> list[asyncpg.Record]:
    """Jobs, newest first, behind the place of ``after``."""
    arguments = (
        list(wanted.statuses),
        wanted.job_type,
        wanted.session_id,
        wanted.character_id,
        wanted.batch_id,
        wanted.created_after,
        wanted.created_before,
    )
    return await connection.fetch(_PAGE, tenant, *arguments, *(after or (None, None)), limit)


async def counts(connection: Connection, tenant: str | None) -> dict[str, int]:
    """Jobs by status; 10001 stands for more than 10000."""
    rows = await connection.fetch(_COUNTS, tenant, list(Status))
    return {row["status"]: row["jobs"] for row in rows}
