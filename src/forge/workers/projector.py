"""The projector: follows the log from the checkpoint in Postgres and keeps every table up to date.

All projections of a stream move together, in one transaction a batch. A batch is what has arrived: one event
when idle, a thousand when behind. When Postgres goes away it waits and goes on from the checkpoint; when two
projectors run, the one that loses a race reads the checkpoint again. Tables made by an older version of a
projection, and missing ones of a long log, are rebuilt beside those that are up to date.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from nats.aio.client import Client

from forge import chronicle, closed, database, guard
from forge.database import Connection, Pool, answering
from forge.errors import Conflict, DatabaseUnavailable, LogUnavailable, ReplayRefused, TablesMissing
from forge.events.envelope import Recorded
from forge.eventstore import EventStore
from forge.projections import shadow
from forge.projections.inventory import inventory
from forge.projections.projection import Projection, advance
from forge.projections.queue import queue
from forge.projections.stats import stats
from forge.projections.uploads import uploads
from forge.projections.usage import usage
from forge.replaying import LONG, due, rebuild
from forge.telemetry import CONSUMER, afterwards, collecting
from forge.topology import ALL_EVENTS, ALL_METRICS, CHECKPOINT, EVENTS, METRICS
from forge.workers import numbers

log = logging.getLogger("forge.projector")

PROJECTIONS = (queue, inventory, stats, uploads, usage)
PACE_SECONDS = 0.02
"""From one transaction to the next at least: an event that follows a quiet moment is taken in at once, a busy
log in batches. A transaction costs as much as ten events."""

LOOK_SECONDS = 2.0
"""How often a projector looks whether what it wrote is still there."""

_KNOWN = "select projection, seq from projection_checkpoint"
_FILTERS = {EVENTS: ALL_EVENTS, METRICS: ALL_METRICS}


async def run(nc: Client, pool: Pool) -> None:
    """Project for ever; ends only by cancellation or by an event that cannot be read.

    Raises:
        LogUnreadable: the event that stopped it, by sequence.
        LogDamaged: events that were taken in are gone, or others are missing.
    """
    async with asyncio.TaskGroup() as group:
        for stream in (EVENTS, METRICS):
            mine = [p for p in PROJECTIONS if p.stream == stream]
            group.create_task(_project(nc, pool, stream, mine), name=f"project {stream}")


async def _project(nc: Client, pool: Pool, stream: str, projections: Sequence[Projection]) -> None:
    pause = 0.1
    while True:
        try:
            async with database.held(pool) as connection:
                await _look_at(EventStore(nc, stream), connection)
                await _not_newer(connection, projections)
                again = await due(connection, projections, await EventStore(nc, stream).head())
                present = [p for p in projections if p not in again]
                positions = {p.name: await p.position(connection) for p in present}
                pause = 0.1
                before = await closed.find(nc, pool) if stream == EVENTS else None
                store = EventStore(nc, stream, before)
                work = [_advance(store, connection, present, positions, tell=not again)] if present else []
                work.append(_rebuilt(nc, pool, again) if again else _emptied(pool, positions))
                await _first_of(*work)
        except (DatabaseUnavailable, LogUnavailable, Conflict) as error:
            numbers.interruptions.labels(stream).inc()
            log.warning("projecting is interrupted", extra={"stream": stream, "reason": str(error)})
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)
            if isinstance(error, TablesMissing):
                with suppress(DatabaseUnavailable):
                    await database.remake(pool)


async def _not_newer(connection: Connection, projections: Sequence[Projection]) -> None:
    """All tables of a stream move together, so whoever knows all of them as they are has to move them.

    Raises:
        Conflict: a newer forge has made some of them its own.
    """
    there = await shadow.positions(connection, await shadow.home(connection))
    newer = [p.name for p in projections if p.name in there and there[p.name].version > p.version]
    if newer:
        raise Conflict(f"a newer forge looks after the tables of {', '.join(newer)}: upgrade this one")


async def _rebuilt(nc: Client, pool: Pool, projections: Sequence[Projection]) -> None:
    """Rebuild these beside the others, or wait until whoever is at it has done so."""
    while projections:
        try:
            log.info("rebuilding", extra={"projections": [p.name for p in projections]})
            await rebuild(nc, pool, projections)
            return
        except ReplayRefused as refused:
            log.warning("rebuilding waits", extra={"reason": refused.detail})
        await asyncio.sleep(1.0)
        async with answering(), pool.acquire() as connection:
            projections = await due(connection, projections, LONG)


async def _emptied(pool: Pool, positions: Mapping[str, int]) -> None:
    """Ends when the tables know less than was written: that is not noticed by writing while nothing happens.

    Raises:
        TablesMissing: they are not even there.
    """
    while True:
        written = dict(positions)
        async with answering(), pool.acquire() as connection:
            known = {row["projection"]: row["seq"] for row in await connection.fetch(_KNOWN)}
        if any(known.get(name, 0) < seq for name, seq in written.items()):
            return
        await asyncio.sleep(LOOK_SECONDS)


async def _first_of(*work: Coroutine[Any, Any, None]) -> None:
    """Do all of it until the first is done."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


_USAGE = "select seq, event_id from projection_checkpoint where projection = 'usage'"
_ANEW = "update projection_checkpoint set seq = 0, event_id = null where projection = 'usage'"


async def _look_at(events: EventStore, connection: Connection) -> None:
    """See whether a stream is the one that was read before. One of samples may be lost without harm: where it
    began anew it is read from its start.

    Raises:
        LogDamaged: the log is not.
    """
    if events.stream == EVENTS:
        await guard.check(events, connection)
    else:
        await _look_for_new_samples(events, connection)


async def _look_for_new_samples(samples: EventStore, connection: Connection) -> None:
    row = await connection.fetchrow(_USAGE)
    if row is None:
        return
    there = await guard.extent(samples)
    found = await samples.id_at(row["seq"]) if there.first <= row["seq"] <= there.last else None
    if there.last < row["seq"] or (found and row["event_id"] and found != str(row["event_id"])):
        log.warning("the stream of samples began anew", extra={"was_at": row["seq"], "ends_at": there.last})
        await connection.execute(_ANEW)


async def _advance(
    store: EventStore,
    connection: Connection,
    projections: Sequence[Projection],
    positions: dict[str, int],
    *,
    tell: bool,
) -> None:
    """Follow the stream for ever; ``tell`` readers how far its tables are, where these are all of them."""
    nc, stream = store.nc, store.stream
    start, now = min(positions.values()) + 1, asyncio.get_running_loop().time
    async with aclosing(chronicle.records(store, start, (_FILTERS[stream],))) as batches:
        async for batch in batches:
            if batch.records:
                began, since = now(), time.time()
                positions.update(await advance(connection, projections, batch.records, positions))
                numbers.projected(stream, batch.records, since, time.time())
                if collecting():
                    _tell(batch.records, since)
                if tell:
                    reached = {"stream": stream, "seq": batch.records[-1].seq}
                    await nc.publish(CHECKPOINT, msgspec.json.encode(reached))
                await asyncio.sleep(max(0.0, PACE_SECONDS - (now() - began)))


def _tell(records: Sequence[Recorded], began: float) -> None:
    """That the tables have these events, in the trace of each."""
    batch = {"forge.batch": len(records)}
    for record in records:
        afterwards("forge.project", record, began, batch, kind=CONSUMER)
