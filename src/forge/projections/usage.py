"""``resource_usage_log`` (D3): samples of disk, memory and queue, folded from the metrics stream."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg

from forge.database import Connection
from forge.events.envelope import Recorded
from forge.events.system import MetricSampled
from forge.projections.projection import Change, Create, Projection, Run, Table
from forge.topology import METRICS

TABLE = Table("resource_usage_log", ("id",))
usage = Projection("usage", version=1, tables=[TABLE], stream=METRICS)

KEPT = timedelta(days=29)
"""A day less than the stream keeps its samples, so that a table that is made again lacks none."""

_EVERY = 100
_FORGET = (
    'delete from resource_usage_log where "timestamp" < (select max(t) from unnest($1::timestamptz[]) t)'
)


@usage.on(MetricSampled)
def sampled(event: MetricSampled, record: Recorded) -> Iterable[Change]:
    yield Create(
        TABLE,
        {
            "id": record.meta.id,
            "timestamp": record.meta.at,
            "metric_type": event.metric_type,
            "metric_value": event.value,
            "metric_unit": event.unit,
            "details": event.details,
            "seq": record.seq,
        },
    )
    if record.seq % _EVERY == 0:
        yield Run(_FORGET, "forgetting", (record.meta.at - KEPT,))


# -------------------------------------------------------------------- reading

_PAGE = """
select id, "timestamp", metric_type, metric_value, metric_unit, details from resource_usage_log
where ($1::text is null or metric_type = $1)
  and ($2::timestamptz is null or "timestamp" >= $2)
  and ($3::timestamptz is null or "timestamp" < $3)
  and ($4::timestamptz is null or ("timestamp", id) < ($4, $5::uuid))
order by "timestamp" desc, id desc
limit $6
"""


async def page(
    connection: Connection,
    metric_type: str | None,
    since: datetime | None,
    until: datetime | None,
    after: tuple[datetime, UUID] | None,
    limit: int,
) -> list[asyncpg.Record]:
    """Samples, newest first, behind the place of ``after``."""
    at, id_ = after or (None, None)
    return await connection.fetch(_PAGE, metric_type, since, until, at, id_, limit)


_STEPS = """
select step as "timestamp", metric_type, round(avg(metric_value))::bigint as metric_value,
       min(metric_unit) as metric_unit,
       jsonb_build_object('min', min(metric_value), 'max', max(metric_value), 'samples', count(*)) as details
from resource_usage_log
cross join lateral date_bin(make_interval(secs => $6), "timestamp", timestamptz 'epoch') as step
where ($1::text is null or metric_type = $1)
  and ($2::timestamptz is null or "timestamp" >= $2)
  and ($3::timestamptz is null or "timestamp" < $3)
  and ($4::timestamptz is null or (step, metric_type) < ($4, $5::text))
group by step, metric_type
order by step desc, metric_type desc
limit $7
"""


async def steps(
    connection: Connection,
    metric_type: str | None,
    since: datetime | None,
    until: datetime | None,
    after: tuple[datetime, str] | None,
    step_seconds: int,
    limit: int,
) -> list[asyncpg.Record]:
    """The mean of each metric in each step of time, newest first, behind the place of ``after``.

    Details tell the least and greatest value and how many samples there were.
    """
    at, type_ = after or (None, None)
    return await connection.fetch(_STEPS, metric_type, since, until, at, type_, step_seconds, limit)


_LATEST = """
select "timestamp", metric_value, details from resource_usage_log
where metric_type = $1 order by "timestamp" desc limit 1
"""


async def latest(connection: Connection, metric_type: str) -> asyncpg.Record | None:
    """The newest sample of a metric."""
    return await connection.fetchrow(_LATEST, metric_type)
