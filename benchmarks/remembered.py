"""What forge keeps in memory of a log on purpose: bytes a job, measured on its own folds of that very log.

The API keeps the line, an hour of granted generations, balances and what was drawn for which recipe; the
dispatcher the line and the recipes. All have a bound, but for one number for each user there ever was, and a
day of 12 960 jobs reaches few of the bounds: so a part of what a process grows by has this known reason.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from contextlib import aclosing

import nats

from benchmarks.trend import Point, trend
from forge.admissions import Admissions
from forge.domain.dispatch import Line
from forge.domain.results import Results
from forge.events.envelope import Recorded
from forge.events.jobs import JobCompleted
from forge.eventstore import EventStore
from forge.follower import follow

_EVERY = 100

Fold = Callable[[Recorded], object]


async def explained(nats_url: str, after: int) -> dict[str, float]:
    """Process → bytes it keeps of each job behind the first ``after`` of the log."""
    nc = await nats.connect(nats_url)
    try:
        admissions = Admissions(EventStore(nc), Line(), queue_limit=1, rate_per_hour=0)
        line, results = Line(), Results()
        folds: dict[str, list[Fold]] = {"api": [admissions.apply], "worker": [line.apply, results.apply]}
        return {name: await _growth(EventStore(nc), fold, after) for name, fold in folds.items()}
    finally:
        await nc.close()


async def _growth(store: EventStore, folds: list[Fold], after: int) -> float:
    head = (await store.state()).head
    jobs, points = 0, list[Point]()
    tracemalloc.start()
    try:
        async with aclosing(follow(store.nc, 1, most=200)) as batches:
            async for batch in batches:
                for record in batch.records:
                    for fold in folds:
                        fold(record)
                    jobs += isinstance(record.event, JobCompleted)
                if jobs >= after + len(points) * _EVERY:
                    points.append((jobs, tracemalloc.get_traced_memory()[0]))
                if batch.records and batch.records[-1].seq >= head:
                    break
    finally:
        tracemalloc.stop()
    found = trend(points, resamples=20)
    return found.slope if found else 0.0
