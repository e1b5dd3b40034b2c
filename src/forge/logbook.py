"""Reading the log and its second copy side by side, and writing either into a file."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import asyncpg
import msgspec

from forge import archive, guard, logfile
from forge.database import Connection
from forge.domain.chain import Entry, Link, unlike
from forge.domain.wholeness import Extent, lacking
from forge.errors import FileUnfit, LogDamaged
from forge.eventstore import EventStore
from forge.follower import follow_written

Progress = Callable[[int, int], None]


class Verified(msgspec.Struct, frozen=True):
    """So many events the log has, of which so many are in the copy; and the end of the copy's chain."""

    events: int
    copied: int
    chain: str


def _silent(done: int, of: int) -> None:
    pass


async def verify(events: EventStore, connection: Connection, progress: Progress = _silent) -> Verified:
    """Read every event of the log and of its second copy, and compare them.

    Raises:
        LogDamaged: the log lacks an event, or has another; the first is named.
        ArchiveDamaged: the copy does not hold together; the first entry that does not fit is named.
        LogUnavailable, DatabaseUnavailable: no answer.
    """
    end = await archive.head(connection)  # before the log is asked, which can only have more
    there = await guard.extent(events)
    if wrong := lacking(there):
        raise LogDamaged(wrong)
    await compare(events, connection, end, there, progress)
    return Verified(there.last, end.seq, end.hash.hex())


async def compare(
    events: EventStore, connection: Connection, end: Link, there: Extent, progress: Progress = _silent
) -> None:
    """Compare the log, as much as is ``there``, with its second copy up to ``end``; what is closed of it only
    has to hold together.

    Raises:
        LogDamaged, ArchiveDamaged, LogUnavailable, DatabaseUnavailable: as :func:`verify`.
    """
    last, log = there.last, _Feed(events, there)
    async with aclosing(log):
        async for page in archive.read(connection, end.seq):
            if page[-1].seq > last:
                raise LogDamaged(f"it ends at event {last}, and the second copy has event {end.seq}")
            both = [copied for copied in page if copied.seq >= there.first]
            for copied, event in zip(both, await log.take(len(both)), strict=True):
                if part := unlike(copied, event):
                    raise LogDamaged(f"the {part} of event {event.seq} is not what the second copy has")
            progress(page[-1].seq, last)
        while log.taken < last:
            await log.take(min(archive.PAGE, last - log.taken))
            progress(log.taken, last)


class _Feed:
    """The log in portions of any size."""

    def __init__(self, events: EventStore, there: Extent) -> None:
        self._pages = written(events, there.first, there.last)
        self._rest: list[Entry] = []
        self.taken = there.first - 1

    async def take(self, count: int) -> list[Entry]:
        while len(self._rest) < count:
            self._rest += await anext(self._pages)
        found, self._rest = self._rest[:count], self._rest[count:]
        self.taken += count
        return found

    async def aclose(self) -> None:
        await self._pages.aclose()


async def written(events: EventStore, first: int, last: int) -> AsyncGenerator[list[Entry], None]:
    """The log from one event to another.

    Raises:
        LogDamaged: it lacks one of them.
    """
    done = first - 1
    if done >= last:
        return
    async with aclosing(follow_written(events.nc, first)) as batches:
        async for batch in batches:
            page = [entry for entry in batch.entries if entry.seq <= last]
            if page:
                yield page
                done = page[-1].seq
            if done == last:
                return
            if batch.caught_up:
                raise LogDamaged(f"the {last - done} events behind event {done} are gone")


async def export(
    events: EventStore, connection: Connection | None, path: Path, progress: Progress = _silent
) -> Link:
    """Write the second copy into a file, and behind it what only the log has; without a connection the log.

    Raises:
        FileUnfit, LogDamaged, ArchiveDamaged, LogUnavailable, DatabaseUnavailable: nothing was written.
    """
    if connection is None:
        there = await guard.extent(events)
        if there.first > 1:
            raise FileUnfit(f"the log has let go what is before event {there.first}: export the copy")
        return await logfile.write(path, written(events, 1, there.last), there.last, progress)
    end = await _copied(connection)
    there = await guard.extent(events)
    # a file that lacks what nobody has copied yet would look like a backup; of a damaged log the copy is all
    last = end if lacking(there) else max(end, there.last)
    return await logfile.write(path, _whole(events, connection, end, last), last, progress)


async def _copied(connection: Connection) -> int:
    """Where the copy ends; there may be none, where no forge ran that makes one."""
    try:
        return (await archive.head(connection)).seq
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return 0


async def _whole(
    events: EventStore, connection: Connection, end: int, last: int
) -> AsyncGenerator[list[Entry], None]:
    if end:
        async for page in archive.read(connection, end):
            yield page
    async with aclosing(written(events, end + 1, last)) as rest:
        async for page in rest:
            yield page
