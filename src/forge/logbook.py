"""Reading the log and its second copy side by side, and writing either into a file."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import msgspec

from forge import archive, guard, logfile
from forge.database import Connection
from forge.domain.chain import Entry, Link, unlike
from forge.domain.wholeness import lacking
from forge.errors import LogDamaged
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
    await compare(events, connection, end, there.last, progress)
    return Verified(there.last, end.seq, end.hash.hex())


async def compare(
    events: EventStore, connection: Connection, end: Link, last: int, progress: Progress = _silent
) -> None:
    """Compare the log, up to its ``last`` event, with its second copy up to ``end``.

    Raises:
        LogDamaged, ArchiveDamaged, LogUnavailable, DatabaseUnavailable: as :func:`verify`.
    """
    log = _Feed(events, last)
    async with aclosing(log):
        async for page in archive.read(connection, end.seq):
            if page[-1].seq > last:
                raise LogDamaged(f"it ends at event {last}, and the second copy has event {end.seq}")
            for copied, event in zip(page, await log.take(len(page)), strict=True):
                if part := unlike(copied, event):
                    raise LogDamaged(f"the {part} of event {event.seq} is not what the second copy has")
            progress(page[-1].seq, last)
        while log.taken < last:
            await log.take(min(archive.PAGE, last - log.taken))
            progress(log.taken, last)


class _Feed:
    """The log in portions of any size."""

    def __init__(self, events: EventStore, last: int) -> None:
        self._pages = written(events, 1, last)
        self._rest: list[Entry] = []
        self.taken = 0

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
    """Write the second copy into a file; without a connection the log itself.

    Raises:
        FileUnfit, LogDamaged, ArchiveDamaged, LogUnavailable, DatabaseUnavailable: nothing was written.
    """
    if connection is None:
        last = (await guard.extent(events)).last
        return await logfile.write(path, written(events, 1, last), last, progress)
    end = await archive.head(connection)
    return await logfile.write(path, archive.read(connection, end.seq), end.seq, progress)
