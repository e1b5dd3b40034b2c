"""``resource_usage_log`` (D3): samples of disk, memory and queue, folded from the metrics stream."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

import asyncpg

from forge.database import Connection
from forge.events.envelope import Recorded
from forge.events.system import MetricSampled
from forge.projections.projection import Change, Create, Projection, Table
from forge.topology import METRICS

TABLE = Table("resource_usage_log", ("id",))
usage = Projection("usage", version=1, tables=[TABLE], stream=METRICS)


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
