"""The projector: follows the log from the checkpoint in Postgres and keeps every table up to date.

All projections of a stream move together, in one transaction a batch. A batch is what has arrived: one event
when idle, a thousand when behind. When Postgres goes away it waits and goes on from the checkpoint; when two
projectors run, the one that loses a race reads the checkpoint again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import msgspec
from nats.aio.client import Client

from forge.database import Connection, Pool, answering
from forge.errors import Conflict, DatabaseUnavailable
from forge.events.envelope import Recorded
from forge.follower import follow
from forge.projections.inventory import inventory
from forge.projections.projection import Projection, advance
from forge.projections.queue import queue
from forge.projections.stats import stats
from forge.projections.uploads import uploads
from forge.projections.usage import usage
from forge.telemetry import afterwards, collecting
from forge.topology import ALL_EVENTS, ALL_METRICS, CHECKPOINT, EVENTS, METRICS

log = logging.getLogger("forge.projector")

PROJECTIONS = (queue, inventory, stats, uploads, usage)
PACE_SECONDS = 0.02
"""From one transaction to the next at least: an event that follows a quiet moment is taken in at once, a busy
log in batches. A transaction costs as much as ten events."""

_FRESH_SECONDS = 60.0
"""An older event is read again, or late: whoever looks at its trace does not ask when."""

_FILTERS = {EVENTS: ALL_EVENTS, METRICS: ALL_METRICS}


async def run(nc: Client, pool: Pool) -> None:
    """Project for ever; ends only by cancellation or by an event that cannot be read.

    Raises:
        LogUnreadable: the event that stopped it, by sequence.
    """
    async with asyncio.TaskGroup() as group:
        for stream in (EVENTS, METRICS):
            mine = [p for p in PROJECTIONS if p.stream == stream]
            group.create_task(_project(nc, pool, stream, mine), name=f"project {stream}")


async def _project(nc: Client, pool: Pool, stream: str, projections: Sequence[Projection]) -> None:
    pause = 0.1
    while True:
        try:
            async with _connected(pool) as connection:
                positions = {p.name: await p.position(connection) for p in projections}
                pause = 0.1
                await _advance(nc, connection, stream, projections, positions)
        except (DatabaseUnavailable, Conflict) as error:
            log.warning("projecting is interrupted", extra={"stream": stream, "reason": str(error)})
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)


@asynccontextmanager
async def _connected(pool: Pool) -> AsyncIterator[Connection]:
    """A connection to hold on to. Its loss is told at once, even when nothing happens in the log: a server
    that crashed may have lost the last commits, and they are to be taken in again.

    Raises:
        DatabaseUnavailable: there is none, or it is gone.
    """
    now = asyncio.get_running_loop().time
    async with answering(), asyncio.timeout(None) as held, pool.acquire() as connection:

        def lost(_: object) -> None:
            held.reschedule(now())

        connection.add_termination_listener(lost)
        try:
            yield connection
        finally:
            connection.remove_termination_listener(lost)


async def _advance(
    nc: Client,
    connection: Connection,
    stream: str,
    projections: Sequence[Projection],
    positions: dict[str, int],
) -> None:
    start, now = min(positions.values()) + 1, asyncio.get_running_loop().time
    async with aclosing(follow(nc, start, (_FILTERS[stream],), stream=stream)) as batches:
        async for batch in batches:
            if batch.records:
                began, since = now(), time.time()
                positions = await advance(connection, projections, batch.records, positions)
                if collecting():
                    _tell(batch.records, since)
                await nc.publish(
                    CHECKPOINT, msgspec.json.encode({"stream": stream, "seq": batch.records[-1].seq})
                )
                await asyncio.sleep(max(0.0, PACE_SECONDS - (now() - began)))


def _tell(records: Sequence[Recorded], began: float) -> None:
    """That the tables have these events, in the trace of each."""
    for record in records:
        if began - record.meta.at.timestamp() < _FRESH_SECONDS:
            afterwards(
                "forge.project",
                record.meta.traceparent,
                began,
                {"forge.event": record.event.type, "forge.seq": record.seq, "forge.batch": len(records)},
            )
