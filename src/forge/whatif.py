"""``forge whatif``: recorded requests under other limits, beside the present ones and what really was."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any

import msgspec

from forge import chronicle, closed
from forge.broker import connect
from forge.credentials import OPERATOR, login
from forge.domain.disk import Lines
from forge.domain.recording import Recording
from forge.domain.simulation import Outcome, Rules, Went, recorded, simulate
from forge.eventstore import EventStore
from forge.settings import Settings

Progress = Callable[[int, int], None]


class Spread(msgspec.Struct, frozen=True):
    """Seconds of so many jobs; None of none."""

    jobs: int
    p50: float | None = None
    p95: float | None = None
    max: float | None = None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One column: ``wait`` is until a job is at ComfyUI, ``done`` until its pictures are there, in seconds.

    ``wait_by`` has a spread for each user or priority; ``refused`` is null where it is not known.
    """

    jobs: dict[str, int]
    refused: dict[str, int] | None
    wait: Spread
    done: Spread
    wait_by: dict[str, Spread]
    utilisation: float
    span_seconds: float
    disk_peak_bytes: int
    disk_end_bytes: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The answer: what was recorded, the present limits, the given ones."""

    since: datetime | None
    until: datetime | None
    events: int
    requests: int
    present: Rules
    given: Rules
    recorded: Figures
    under_present: Figures
    under_given: Figures


def present(settings: Settings) -> Rules:
    """The limits that are in force."""
    return Rules(
        rate_per_hour=settings.rate_per_hour,
        queue_limit=settings.queue_limit,
        ttl_seconds=settings.asset_ttl_seconds,
        ttls=settings.asset_ttls,
        disk_limit=settings.disk_limit_bytes,
        lines=Lines(settings.disk_warn_ratio, settings.disk_clean_ratio, settings.disk_reserve_bytes),
        target_ratio=settings.target_ratio,
    )


def run(
    settings: Settings,
    changes: dict[str, Any],
    since: datetime | None,
    until: datetime | None,
    by: str,
    progress: Progress,
) -> Comparison:
    """Compare, over the log of these settings.

    Raises:
        LogUnavailable, LogUnreadable: it cannot be read.
    """
    recording = asyncio.run(record(settings, progress))
    return compare(recording, present(settings), changes, since, until, by)


async def record(settings: Settings, progress: Progress = lambda done, of: None) -> Recording:
    """The whole log, read for a simulation."""
    nc = await connect(settings.nats_url, "whatif", login(settings.nats_passwords_dir, OPERATOR))
    try:
        async with closed.found(nc, settings.postgres_dsn) as before:
            return await _read(EventStore(nc, before=before), Recording(), progress)
    finally:
        await nc.close()


async def _read(store: EventStore, recording: Recording, progress: Progress) -> Recording:
    head = await store.head()
    async with aclosing(chronicle.records(store)) as batches:
        async for batch in batches:
            for event in batch.records:
                recording.apply(event)
            progress(len(recording.records), head)
            if batch.caught_up or (batch.records and batch.records[-1].seq >= head):
                return recording
    return recording  # pragma: no cover  # following never ends by itself


def compare(
    recording: Recording,
    now: Rules,
    changes: dict[str, Any],
    since: datetime | None = None,
    until: datetime | None = None,
    by: str = "priority",
) -> Comparison:
    """The three columns."""
    given = msgspec.structs.replace(now, **changes)
    records = recording.records
    begin = since or (records[0].meta.at if records else datetime.max)
    end = until or (max(record.meta.at for record in records) if records else datetime.max)
    real = recorded(recording, begin, end)
    return Comparison(
        since=since,
        until=until,
        events=len(records),
        requests=len(real.jobs),
        present=now,
        given=given,
        recorded=_figures(real, by),
        under_present=_figures(simulate(recording, now, begin, end), by),
        under_given=_figures(simulate(recording, given, begin, end), by),
    )


def _figures(outcome: Outcome, by: str) -> Figures:
    ended: dict[str, int] = defaultdict(int)
    groups: dict[str, list[Went]] = defaultdict(list)
    for job in outcome.jobs:
        ended[job.outcome] += 1
        groups[str(getattr(job, by))].append(job)
    room = outcome.span * outcome.gpus
    return Figures(
        jobs=dict(sorted(ended.items())),
        refused=outcome.refused,
        wait=_waits(outcome.jobs),
        done=spread(
            [job.took for job in outcome.jobs if job.took is not None and job.outcome == "completed"]
        ),
        wait_by={name: _waits(groups[name]) for name in sorted(groups, key=lambda n: (len(n), n))},
        utilisation=outcome.busy / room if room else 0.0,
        span_seconds=outcome.span,
        disk_peak_bytes=outcome.disk_peak,
        disk_end_bytes=outcome.disk_end,
    )


def _waits(jobs: Sequence[Went]) -> Spread:
    return spread([job.waited for job in jobs if job.waited is not None])


def spread(seconds: Sequence[float]) -> Spread:
    """Percentiles by nearest rank."""
    if not seconds:
        return Spread(0)
    ranked = sorted(seconds)

    def part(ratio: float) -> float:
        return ranked[max(0, math.ceil(ratio * len(ranked)) - 1)]

    return Spread(len(ranked), part(0.5), part(0.95), ranked[-1])
