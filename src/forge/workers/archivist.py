"""The archivist: follows the log and keeps its second copy up to date, beside the projector.

It copies messages as they were written, so what no table can hold is copied too. A copy is made a moment
later than it could be, so that a busy log costs few transactions.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing

from nats.aio.client import Client

from forge import archive, database, guard
from forge.broker import stored_at
from forge.database import Connection, Pool
from forge.domain.chain import Entry, written
from forge.errors import Conflict, DatabaseUnavailable, LogUnavailable
from forge.eventstore import EventStore
from forge.follower import follow_written
from forge.topology import EVENTS

log = logging.getLogger("forge.archivist")

PACE_SECONDS = 0.2
"""From one transaction to the next at least: five thousand events a second."""

_ALWAYS = {"ce-id", "ce-type", "ce-source", "ce-subject", "ce-time", "ce-actor", "ce-correlationid"}


async def run(nc: Client, pool: Pool) -> None:
    """Copy for ever; ends only by cancellation or by a log that is not whole. Of two archivists one copies.

    Raises:
        LogDamaged: the log is not the one that was copied, or lacks events.
    """
    pause = 0.1
    while True:
        try:
            async with database.held(pool) as connection:
                await guard.check(EventStore(nc), connection)
                pause = 0.1
                await _copy(nc, connection)
        except (DatabaseUnavailable, LogUnavailable, Conflict) as error:
            log.warning("copying the log is interrupted", extra={"reason": str(error)})
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)


async def _copy(nc: Client, connection: Connection) -> None:
    place = await archive.head(connection)
    async with aclosing(follow_written(nc, place.seq + 1)) as batches:
        async for batch in batches:
            if batch.entries:
                for entry in filter(_odd, batch.entries):
                    await _as_it_is(nc, entry)
                place = await archive.add(connection, place, batch.entries)
                await asyncio.sleep(PACE_SECONDS)


def _odd(entry: Entry) -> bool:
    """Whether it is not as forge writes."""
    try:
        entry.data.decode()
    except UnicodeDecodeError:
        return True
    if not entry.headers.keys() >= _ALWAYS:
        return True
    return any("\ufffd" in name + value for name, value in entry.headers.items())


async def _as_it_is(nc: Client, entry: Entry) -> None:
    """The log may have it so; else it was spoilt on its way, and the copy is for ever.

    Raises:
        LogUnavailable: the log has something else, or does not answer.
    """
    found = await stored_at(nc, EVENTS, entry.seq)
    if found is None or (written(found.headers or {}), found.data) != (entry.headers, entry.data):
        raise LogUnavailable(f"event {entry.seq} arrived garbled")
