"""The projector: follows the log from the checkpoint in Postgres and keeps every table up to date.

All projections of a stream move together, in one transaction a batch. A batch is what has arrived: one event
when idle, a thousand when behind. When Postgres goes away it waits and goes on from the checkpoint; when two
projectors run, the one that loses a race reads the checkpoint again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
from nats.aio.client import Client

from forge.database import Pool, answering
from forge.errors import Conflict, DatabaseUnavailable
from forge.events.envelope import Recorded
from forge.follower import follow
from forge.projections.inventory import inventory
from forge.projections.projection import Projection
from forge.projections.queue import queue
from forge.projections.stats import stats
from forge.projections.usage import usage
from forge.topology import ALL_EVENTS, ALL_METRICS, CHECKPOINT, EVENTS, METRICS

log = logging.getLogger("forge.projector")

PROJECTIONS = (queue, inventory, stats, usage)
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
            async with answering(), pool.acquire() as connection:
                positions = {p.name: await p.position(connection) for p in projections}
            pause = 0.1
            await _advance(nc, pool, stream, projections, positions)
        except (DatabaseUnavailable, Conflict) as error:
            log.warning("projecting is interrupted", extra={"stream": stream, "reason": str(error)})
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)


async def _advance(
    nc: Client, pool: Pool, stream: str, projections: Sequence[Projection], positions: dict[str, int]
) -> None:
    start = min(positions.values()) + 1
    async with aclosing(follow(nc, start, (_FILTERS[stream],), stream=stream)) as batches:
        async for batch in batches:
            if batch.records:
                await _take_in(pool, projections, positions, batch.records)
                await nc.publish(
                    CHECKPOINT, msgspec.json.encode({"stream": stream, "seq": batch.records[-1].seq})
                )


async def _take_in(
    pool: Pool, projections: Sequence[Projection], positions: dict[str, int], records: list[Recorded]
) -> None:
    async with answering(), pool.acquire() as connection, connection.transaction():
        for projection in projections:
            positions[projection.name] = await projection.advance(
                connection, records, positions[projection.name]
            )
