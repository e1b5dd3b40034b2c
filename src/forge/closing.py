"""Closing the book: the beginning of the log leaves the stream and lives on in the second copy.

::

    compared            the log with the copy, and what is closed already with its own hashes
    allowed             nobody needs those events in the stream: tables, clean-ups, announcements, open jobs
    written down        in Postgres, on its disk: how far, the chain there, what the events are about
    shut, trimmed, open three updates of the stream; it takes no event between the first and the last

Cut anywhere it may be run again, and the log is whole at each of these moments; a stream that was left shut
is opened by ``forge setup``, too. Why forge may not run meanwhile: whoever has decided on what a closed event
says, and has not written yet, would no longer be refused if somebody else came first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any

import msgspec
from nats.aio.client import Client

from forge import archive, chronicle, closed, guard, logbook, topology
from forge.broker import request, stored
from forge.database import Connection, Pool
from forge.domain.closing import MARK, Bound, Mark, refusal
from forge.domain.dispatch import Line
from forge.errors import ClosingRefused, LogUnavailable
from forge.eventstore import EventStore
from forge.projections.projection import Projection
from forge.topology import ALL_ADMISSIONS, ALL_JOB_FACTS, ALL_READY, ASSETS_READY, CLEANUP, EVENTS

_SHUT = ["forge.closing"]
_TRIM_SECONDS = 60.0
_NOTE = "insert into forge_log.closed (through, chain, known) values ($1, $2, $3) on conflict do nothing"

Progress = Callable[[int, int], None]


class Wanted(msgspec.Struct, frozen=True):
    """Through which event, or everything that arrived before a moment."""

    through: int | None = None
    before: datetime | None = None


class Closing(msgspec.Struct, frozen=True):
    """The stream's events from ``first`` through ``through``, of ``last``, may leave it."""

    first: int
    through: int
    last: int


async def look(
    nc: Client, pool: Pool, projections: Sequence[Projection], wanted: Wanted, progress: Progress
) -> Closing:
    """Compare the log with its copy, and see whether the book can be closed so far; changes nothing.

    Raises:
        ClosingRefused: forge runs, or somebody needs some of these events in the stream.
        LogDamaged, ArchiveDamaged: the log, or the copy, is not whole.
        LogUnavailable, DatabaseUnavailable: no answer.
    """
    if readers := await guard.readers(nc):
        raise ClosingRefused(f"forge runs: {readers}. Stop every api and worker first")
    events = EventStore(nc, before=await closed.find(nc, pool))
    async with pool.acquire() as connection:
        await guard.check(events, connection)
        await logbook.verify(events, connection, progress)
        there = await guard.extent(events)
        through = await _through(events, wanted, there.last)
        if through < there.first:
            raise ClosingRefused(f"the stream begins at event {there.first}: nothing to close before that")
        bounds = [bound async for bound in _bounds(events, connection, projections, there.last)]
    if wrong := refusal(through, there.last, bounds):
        raise ClosingRefused(wrong)
    return Closing(there.first, through, there.last)


async def close(nc: Client, pool: Pool, plan: Closing) -> None:
    """Let go what was looked at.

    Raises:
        ClosingRefused: something was written meanwhile.
        LogUnavailable, DatabaseUnavailable: no answer; run it again.
    """
    async with pool.acquire() as connection:
        place = await archive.at(connection, plan.through)
        known = await closed.known_through(connection, plan.through)
        async with connection.transaction():
            await connection.execute("set local synchronous_commit = on")  # and all before it
            await connection.execute(
                _NOTE,
                plan.through,
                place.hash,
                bytes(known.bits),
            )
    config = await _config(nc, Mark(plan.through, place.hash.hex()))
    shut = config | {"subjects": _SHUT}
    await _update(nc, shut)
    try:
        if (await guard.extent(EventStore(nc))).last != plan.last:
            raise ClosingRefused("something was written meanwhile: is a forge running?")
        await _update(nc, shut | {"discard": "old", "max_msgs": plan.last - plan.through})
        await _trimmed(nc, plan.through)
    finally:
        await _update(nc, config)


async def _through(events: EventStore, wanted: Wanted, last: int) -> int:
    if wanted.before is None:
        assert wanted.through is not None
        return wanted.through
    later = await events.since(wanted.before)
    return min(last - 1, last if later is None else later.seq - 1)


async def _bounds(
    events: EventStore, connection: Connection, projections: Sequence[Projection], last: int
) -> AsyncIterator[Bound]:
    """Who needs events in the stream, and from where on."""
    yield Bound("the second copy", (await archive.head(connection)).seq)
    for projection in projections:
        yield Bound(f"the checkpoint of {projection.name}", await projection.position(connection))
    yield Bound("the clean-up of files", await _cleaned(events.nc, last))
    yield Bound(f"the announcing in {ASSETS_READY}", await _announced(events, last))
    line = Line()
    async with aclosing(chronicle.records(events, 1, (ALL_ADMISSIONS, ALL_JOB_FACTS))) as batches:
        async for batch in batches:
            for record in batch.records:
                line.apply(record)
            if batch.caught_up:
                break
    for job in line.jobs.values():
        yield Bound(f"job {job.id}, which is {job.status},", job.submitted_seq - 1)


async def _cleaned(nc: Client, last: int) -> int:
    info = msgspec.json.decode(await request(nc, f"CONSUMER.INFO.{EVENTS}.{CLEANUP}"))
    idle = not info["num_pending"] and not info["num_ack_pending"]
    return last if idle else int(info["ack_floor"]["stream_seq"])


async def _announced(events: EventStore, last: int) -> int:
    ready = await stored(events.nc, EVENTS, {"last_by_subj": ALL_READY})
    newest = await stored(events.nc, ASSETS_READY, {"last_by_subj": ">"})
    told = (newest.headers or {}).get("Nats-Stream-Source", "").split(" ") if newest else []
    done = int(told[1]) if len(told) > 1 else 0
    behind = ready is not None and int((ready.headers or {})["Nats-Sequence"]) > done
    return done if behind else last


async def _config(nc: Client, mark: Mark) -> dict[str, Any]:
    """The stream as it should be, with the mark."""
    there: dict[str, Any] = msgspec.json.decode(await request(nc, f"STREAM.INFO.{EVENTS}"))["config"]
    declared = topology.declared(EVENTS)
    declared.pop("num_replicas", None)
    return there | declared | {"metadata": there.get("metadata", {}) | {MARK: mark.text()}}


async def _update(nc: Client, config: dict[str, Any]) -> None:
    await request(nc, f"STREAM.UPDATE.{EVENTS}", config, timeout=_TRIM_SECONDS)


async def _trimmed(nc: Client, through: int) -> None:
    deadline = time.monotonic() + _TRIM_SECONDS
    while (await guard.extent(EventStore(nc))).first != through + 1:
        if time.monotonic() > deadline:
            raise LogUnavailable("NATS does not let go what is closed; run it again")
        await asyncio.sleep(0.05)
