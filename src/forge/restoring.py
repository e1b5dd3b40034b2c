"""Giving the log back from its second copy: the same events under the same sequences, in a stream made anew.

::

    a file → the second copy          what it lacks, if a file is given
    the damaged log → the second copy what is newer than the copy and can still be read
    the second copy → a new stream    in order, each expecting the one before; may be cut and run again
    compared, then opened             consumers where they were; nothing is announced twice

The server gives restored messages the time of now; when they first arrived stands in a header. Everybody who
starts meanwhile is refused by the guard.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client

from forge import archive, guard, logbook, logfile, topology
from forge.broker import BrokerRefused, request, stored
from forge.database import Connection
from forge.domain.chain import ARRIVED, Entry, Link
from forge.domain.wholeness import Extent
from forge.errors import LogDamaged, LogUnavailable, RestoreRefused
from forge.eventstore import EventStore
from forge.projections.projection import Projection
from forge.topology import ASSETS_READY, CLEANUP, EVENTS, NOT_FOUND

_WRITE_SECONDS = 30.0


class Step(msgspec.Struct, frozen=True):
    """What is done now, and how many events of how many."""

    what: str
    done: int
    of: int


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What was done: the events the log has now, how many of them were written now, were saved from the
    damaged log, and were given up. ``announced`` says whether `FORGE_ASSETS_READY` was there and goes on;
    where it was not, everything is announced anew."""

    events: int
    written: int
    saved: int
    lost: int
    announced: bool


Progress = Callable[[Step], None]


def _silent(_: Step) -> None:
    pass


async def restore(
    nc: Client,
    connection: Connection,
    projections: Sequence[Projection],
    file: Path | None = None,
    *,
    shorter: bool = False,
    reopen: bool = False,
    replicas: int | None = None,
    progress: Progress = _silent,
) -> Restored:
    """Make the log whole again, or fill that of a new server; ``replicas`` as in :func:`topology.apply`.

    ``shorter`` gives up what neither the copy nor the damaged log can give; the tables of ``projections`` are
    emptied where they know of such events. ``reopen`` takes a whole log whose book is closed, too: all of it
    is in the stream again.

    Raises:
        RestoreRefused: forge runs; the log is whole; it is another log; or events would be lost.
        ArchiveDamaged, FileUnfit: the copy, or the file, does not hold together. Nothing was changed.
        LogDamaged: the log that was written is not the copy.
        LogUnavailable, DatabaseUnavailable: no answer; run it again.
    """
    events = EventStore(nc)
    if readers := await guard.readers(nc):
        raise RestoreRefused(f"forge runs: {readers}. Stop every api and worker first")
    if file is not None:
        await _take_in(connection, file, progress)
    end = await archive.head(connection)
    if not end.seq:
        raise RestoreRefused("there is no second copy; give a file that forge log export wrote")
    there = await guard.extent(events)
    saved = lost = 0
    if not there.restoring:
        await _holds(connection, end, progress)
        await _needed(events, connection, there, end, progress, reopen=reopen)
        end, saved = await _save(events, connection, there, end)
        lost = max(0, max(there.last, await _furthest(connection, projections)) - end.seq)
        if lost and not shorter:
            raise RestoreRefused(
                f"{lost} events behind event {end.seq} are not in the second copy and cannot be read; "
                "--shorter gives them up"
            )
        await _begin(nc, end, replicas)
        there = Extent(0, 0, restoring=True)
    await _fill(nc, connection, there.last, end, progress)
    await logbook.compare(events, connection, end, Extent(1, end.seq), _told(progress, "comparing"))
    await _forget(connection, projections, end)
    announced = await _open(nc, replicas)
    return Restored(events=end.seq, written=end.seq - there.last, saved=saved, lost=lost, announced=announced)


# ------------------------------------------------------------------- beforehand


async def _take_in(connection: Connection, file: Path, progress: Progress) -> None:
    """What the copy lacks of a file, if the one is the beginning of the other."""
    had = await archive.head(connection)
    end, middle = logfile.check(file, had.seq, _told(progress, "checking the file"))
    if had.seq > end.seq:
        raise RestoreRefused(
            f"the second copy has {had.seq} events and {file} {end.seq}: restore without the file"
        )
    if had != middle:
        raise RestoreRefused(f"{file} is of another log than the second copy")
    place = had
    for page in logfile.read(file, had.seq):
        place = await archive.add(connection, place, page)
        progress(Step("copying the file", place.seq, end.seq))


async def _holds(connection: Connection, end: Link, progress: Progress) -> None:
    async for page in archive.read(connection, end.seq):
        progress(Step("checking the copy", page[-1].seq, end.seq))


async def _needed(
    events: EventStore,
    connection: Connection,
    there: Extent,
    end: Link,
    progress: Progress,
    *,
    reopen: bool,
) -> None:
    if not there.last:
        return
    begin = there.closed.through + 1
    if end.seq < begin:
        raise RestoreRefused(
            f"the book is closed through event {begin - 1}, and the second copy ends at event {end.seq}: "
            "give a file that forge log export wrote"
        )
    first = await anext(archive.read(connection, begin, after=await archive.at(connection, begin - 1)))
    found = await events.id_at(begin)
    if found is not None and found != first[0].event_id:
        raise RestoreRefused(
            f"the log there is another one: its event {begin} is {found or 'nobody knows which'}, and the "
            f"copy has {first[0].event_id} there. If it may go, delete the stream {EVENTS} by hand"
        )
    with suppress(LogDamaged):
        await guard.check(events, connection)
        await logbook.compare(events, connection, end, there, _told(progress, "comparing"))
        if not there.closed.through:
            raise RestoreRefused(f"the log is whole: {there.last} events, of which the copy has {end.seq}")
        if not reopen:
            raise RestoreRefused(
                f"the log is whole: {there.last} events, of which {there.closed.through} are closed; "
                "--reopen writes them into the stream again"
            )


async def _save(events: EventStore, connection: Connection, there: Extent, end: Link) -> tuple[Link, int]:
    """What the damaged log has behind the end of the copy, as far as it can be read."""
    had = end
    with suppress(LogDamaged):
        async for page in logbook.written(events, end.seq + 1, there.last):
            end = await archive.add(connection, end, page)
    return end, end.seq - had.seq


# ------------------------------------------------------------------- the stream


async def _begin(nc: Client, end: Link, replicas: int | None) -> None:
    """The damaged stream goes, and an empty one comes that nobody reads yet."""
    cleaned = await _cleaned(nc)
    await _announce(nc, False)
    with suppress(BrokerRefused):
        await request(nc, f"STREAM.DELETE.{EVENTS}")
    config = _configured(replicas) | {
        "metadata": {guard.RESTORING: str(end.seq if cleaned is None else cleaned)}
    }
    await request(nc, f"STREAM.CREATE.{EVENTS}", config)


def _configured(replicas: int | None) -> dict[str, Any]:
    config = topology.declared(EVENTS)
    return config if replicas is None else config | {"num_replicas": replicas}


async def _fill(nc: Client, connection: Connection, done: int, end: Link, progress: Progress) -> None:
    js = nc.jetstream(publish_async_max_pending=2 * archive.PAGE)
    async for page in archive.read(connection, end.seq, after=await archive.at(connection, done)):
        sent = [await js.publish_async(e.subject, e.data, headers=_headers(e)) for e in page]
        try:
            await asyncio.wait_for(asyncio.gather(*sent), _WRITE_SECONDS)
        except TimeoutError:
            raise LogUnavailable("NATS does not take the events; run it again") from None
        except Exception as error:
            raise LogUnavailable(f"NATS did not take the events, run it again: {error}") from error
        progress(Step("writing", page[-1].seq, end.seq))


def _headers(entry: Entry) -> dict[str, str]:
    """Its own, and where it is to stand. It is not told its message id: the server would keep a million."""
    place = {"Nats-Expected-Last-Sequence": str(entry.seq - 1), ARRIVED: entry.arrived.isoformat()}
    return entry.headers | place


async def _open(nc: Client, replicas: int | None) -> bool:
    """Everything else as it should be, and last of all the mark away; whether announcements go on."""
    info = msgspec.json.decode(await request(nc, f"STREAM.INFO.{EVENTS}"))
    config = info["config"]
    cleaned = int(config["metadata"].pop(guard.RESTORING))
    announced = await _announce(nc, True)
    await topology.apply(nc, replicas=replicas)
    await request(nc, f"CONSUMER.RESET.{EVENTS}.{CLEANUP}", {"seq": cleaned + 1})
    await request(nc, f"STREAM.UPDATE.{EVENTS}", config)
    return announced


async def _cleaned(nc: Client) -> int | None:
    """How far clean-ups were done; None where the consumer is gone, and then what it was at is found as
    files without rows."""
    try:
        info = msgspec.json.decode(await request(nc, f"CONSUMER.INFO.{EVENTS}.{CLEANUP}"))
    except BrokerRefused:
        return None
    return int(info["ack_floor"]["stream_seq"])


async def _announce(nc: Client, on: bool) -> bool:
    """Let the public stream follow the log, from behind what it has, or not; whether there is one.

    A stream whose source is made anew would take everything from it once more.
    """
    try:
        config = msgspec.json.decode(await request(nc, f"STREAM.INFO.{ASSETS_READY}"))["config"]
    except BrokerRefused as refused:
        if refused.err_code in NOT_FOUND:
            return False
        raise
    if on == bool(config.get("sources")):
        return True
    sources: list[dict[str, Any]] = []
    if on:
        [source] = topology.declared(ASSETS_READY)["sources"]
        newest = await stored(nc, ASSETS_READY, {"last_by_subj": ">"})
        told = (newest.headers or {}).get("Nats-Stream-Source", "").split(" ") if newest else []
        sources = [source | {"opt_start_seq": int(told[1]) + 1}] if len(told) > 1 else [source]
    await request(nc, f"STREAM.UPDATE.{ASSETS_READY}", {**config, "sources": sources})
    return True


# -------------------------------------------------------------------- the tables


async def _furthest(connection: Connection, projections: Sequence[Projection]) -> int:
    """The last event that the tables know of."""
    names = [projection.name for projection in projections]
    furthest = "select max(seq) from projection_checkpoint where projection = any($1)"
    return await connection.fetchval(furthest, names) or 0


async def _forget(connection: Connection, projections: Sequence[Projection], end: Link) -> None:
    """Tables that tell of events which are no more are emptied; the projector fills them again."""
    if await _furthest(connection, projections) <= end.seq:
        return
    tables = ", ".join(table.name for projection in projections for table in projection.tables)
    names = [projection.name for projection in projections]
    async with connection.transaction():
        await connection.execute(f"truncate {tables}")
        await connection.execute("delete from projection_checkpoint where projection = any($1)", names)


def _told(progress: Progress, what: str) -> Callable[[int, int], None]:
    return lambda done, of: progress(Step(what, done, of))
