"""What runs and how well: catalogue, statistics, usage, health."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

import asyncpg
from litestar import Request, Response, Router, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import QueryParameter

from forge import guard
from forge.api import cursors, edge
from forge.api.disk import disk_stats
from forge.api.fresh import MinSeq, listing
from forge.api.parts import Parts, parts_of
from forge.api.problems import documented, documented_for_all
from forge.api.schemas import (
    CacheStats,
    Catalogue,
    Check,
    QueueStats,
    Readiness,
    Sample,
    StatsView,
    StoredBytes,
    TypeStats,
    UsagePage,
)
from forge.comfyui.workflows import catalogue as entries
from forge.domain.jobs import Status
from forge.errors import ForgeError
from forge.projections import asset_lists, reading, stats, usage

Asked = Request[Any, Any, Any]
Time = Annotated[str | None, QueryParameter(max_length=40, schema_extra={"format": "date-time"})]

log = logging.getLogger("forge.api")

_CHECK_SECONDS = 1.0


@get("/catalogue", responses=documented(), tags=["operations"], operation_id="getCatalogue")
async def catalogue(request: Asked) -> Catalogue:
    """The job types there are, with the JSON Schema of their params."""
    return Catalogue(items=entries(parts_of(request).workflows))


# ---------------------------------------------------------------- statistics


@get("/stats", responses=documented(422), tags=["operations"], operation_id="getStats")
async def read_stats(
    request: Asked,
    hours: Annotated[int, QueryParameter(ge=1, le=24 * 366, description="How far to look back.")] = 24,
    min_seq: MinSeq = None,
) -> Response[StatsView]:
    """What came of jobs in the last hours, what is stored, and the queue now."""
    parts = parts_of(request)
    now = datetime.now(UTC)
    since = now.replace(minute=0, second=0, microsecond=0) - timedelta(hours=hours - 1)
    async with listing(parts, min_seq) as tables:
        rows = await stats.outcomes(tables.connection, since)
        stored = await asset_lists.stored_bytes(tables.connection)
        disk = await disk_stats(tables.connection, parts.capacity.lines, since, now)
    by_type = defaultdict(list)
    for row in rows:
        by_type[row["job_type"]].append(row)
    total = _outcomes(rows)
    drawn_or_cached = total.completed + total.cached
    view = StatsView(
        window_hours=hours,
        total=total,
        by_type={job_type: _outcomes(mine) for job_type, mine in by_type.items()},
        throughput_per_hour=round(drawn_or_cached / ((now - since) / timedelta(hours=1)), 3),
        bytes_by_type={type_: StoredBytes(assets=n, bytes=size) for type_, (n, size) in stored.items()},
        cache=CacheStats(
            hits=total.cached, ratio=total.cached / drawn_or_cached if drawn_or_cached else None
        ),
        queue=_queue_now(parts, now),
        disk=disk,
    )
    return Response(view, headers={"x-forge-seq": str(tables.seq)})


def _outcomes(rows: Iterable[asyncpg.Record]) -> TypeStats:
    rows = list(rows)

    def jobs(outcome: str) -> int:
        return sum(row["jobs"] for row in rows if row["outcome"] == outcome)

    drawn = [row for row in rows if row["outcome"] == "completed"]
    buckets: dict[int, int] = defaultdict(int)
    for row in drawn:
        buckets[row["duration_bucket"]] += row["jobs"]
    spread, count = sorted(buckets.items()), sum(buckets.values())
    return TypeStats(
        submitted=jobs("submitted"),
        completed=count,
        cached=jobs("cached"),
        failed=jobs("failed"),
        cancelled=jobs("cancelled"),
        p50_ms=stats.percentile(spread, 0.5),
        p95_ms=stats.percentile(spread, 0.95),
        mean_ms=sum(row["run_ms"] for row in drawn) / count if count else None,
        mean_wait_ms=sum(row["waited_ms"] for row in drawn) / count if count else None,
    )


def _queue_now(parts: Parts, now: datetime) -> QueueStats:
    jobs = parts.admissions.line.jobs.values()
    waiting = [job.admitted_at for job in jobs if job.status is Status.PENDING]
    oldest = (now - min(waiting)).total_seconds() if waiting else None
    return QueueStats(pending=len(waiting), running=len(jobs) - len(waiting), oldest_seconds=oldest)


@get("/usage", responses=documented(422), tags=["operations"], operation_id="getUsage")
async def read_usage(
    request: Asked,
    metric_type: Annotated[str | None, QueryParameter(max_length=100)] = None,
    since: Time = None,
    until: Time = None,
    limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 200,
    cursor: Annotated[str | None, QueryParameter(max_length=500)] = None,
    step: Annotated[
        int | None,
        QueryParameter(
            ge=1, le=30 * 86400, description="Seconds to take the mean of; default: every sample."
        ),
    ] = None,
) -> UsagePage:
    """Samples of disk, memory and queue, newest first. With `step` the mean of each stretch of time, whose
    least and greatest value and number of samples are in `details`."""
    metric_type = edge.name("metric_type", metric_type, 100)
    begin, end = edge.moment("since", since), edge.moment("until", until)
    if step is not None:
        return await _means(parts_of(request), metric_type, begin, end, step, limit, cursor)
    mark = cursors.tag("usage", metric_type, begin, end)
    place = cursors.read(mark, cursor, tuple[cursors.Micros, UUID])
    after = place and (cursors.moment(place[0]), place[1])
    async with listing(parts_of(request), None) as tables:
        rows = await usage.page(tables.connection, metric_type, begin, end, after, limit + 1)
    last = rows[limit - 1] if len(rows) > limit else None
    return UsagePage(
        items=[Sample(**{k: v for k, v in row.items() if k != "id"}) for row in rows[:limit]],
        next_cursor=cursors.write(mark, cursors.micros(last["timestamp"]), last["id"]) if last else None,
    )


async def _means(
    parts: Parts,
    metric_type: str | None,
    begin: datetime | None,
    end: datetime | None,
    step: int,
    limit: int,
    cursor: str | None,
) -> UsagePage:
    mark = cursors.tag("usage", metric_type, begin, end, step)
    place = cursors.read(mark, cursor, tuple[cursors.Micros, str])
    after = place and (cursors.moment(place[0]), place[1])
    async with listing(parts, None) as tables:
        rows = await usage.steps(tables.connection, metric_type, begin, end, after, step, limit + 1)
    last = rows[limit - 1] if len(rows) > limit else None
    return UsagePage(
        items=[Sample(**row) for row in rows[:limit]],
        next_cursor=cursors.write(mark, cursors.micros(last["timestamp"]), last["metric_type"])
        if last
        else None,
    )


router = Router("/", route_handlers=[catalogue, read_stats, read_usage])


# -------------------------------------------------------------------- health


@get("/livez", media_type="text/plain", include_in_schema=False)
async def livez() -> str:
    """The event loop turns."""
    return "ok\n"


@get(
    "/readyz",
    tags=["health"],
    security=[],
    operation_id="getReadiness",
    responses=documented_for_all()
    | {503: ResponseSpec(Readiness, description="Something is missing.", generate_examples=False)},
)
async def readyz(request: Asked) -> Response[Readiness]:
    """Whether everything forge needs is there: 200 or 503, with each check."""
    parts = parts_of(request)
    names = {
        "log": _log,
        "log_whole": _whole,
        "database": _database,
        "store": _store,
        "disk": _disk,
        "memory": _memory,
        "caught_up": _caught_up,
    }
    found = await asyncio.gather(*(_checked(parts, check) for check in names.values()))
    leaving: bool = request.app.state.leaving
    staying = Check(ok=not leaving, detail="told to stop" if leaving else "")
    checks = dict(zip(names, found, strict=True)) | {"staying": staying}
    ready = all(check.ok for check in checks.values())
    _told(request, {name: check.detail for name, check in checks.items() if not check.ok})
    return Response(
        Readiness(ready=ready, checks=checks),
        status_code=200 if ready else 503,
        headers={"cache-control": "no-store"} | ({} if ready else {"retry-after": "2"}),
    )


def _told(request: Asked, wrong: dict[str, str]) -> None:
    """A line when it changes: whoever reads the log should not have to ask what was the matter last night."""
    before: frozenset[str] = request.app.state.unready
    if before != wrong.keys():
        request.app.state.unready = frozenset(wrong)
        if wrong:
            log.warning("not ready", extra={"checks": wrong})
        else:
            log.info("ready again")


async def _checked(parts: Parts, check: Callable[[Parts], Awaitable[str]]) -> Check:
    bound = asyncio.timeout(_CHECK_SECONDS)
    try:
        async with bound:
            wrong = await check(parts)
    except (ForgeError, TimeoutError, OSError) as error:  # a connection that is cut off complains of that
        wrong = "no answer in time" if bound.expired() else str(error)
    return Check(ok=not wrong, detail=wrong)


async def _log(parts: Parts) -> str:
    if not parts.nc.is_connected:
        return "not connected to NATS"
    await parts.store.head()
    return ""


async def _whole(parts: Parts) -> str:
    if not parts.nc.is_connected:
        return "not looked at: not connected to NATS"
    async with reading.looking(parts.pool) as tables:
        await guard.check(parts.store, tables.connection)
    return ""


async def _database(parts: Parts) -> str:
    await reading.position(parts.pool)
    return ""


async def _store(parts: Parts) -> str:
    there = await asyncio.to_thread(parts.blobs.marker_present)
    return "" if there else "the asset volume has no marker: is it mounted?"


async def _disk(parts: Parts) -> str:
    await parts.capacity.room()
    return ""


async def _memory(parts: Parts) -> str:
    parts.capacity.spare()
    return ""


async def _caught_up(parts: Parts) -> str:
    if parts.live.closing:
        return "stopping"
    return "" if parts.admissions.caught_up.is_set() else "still reading the log"
