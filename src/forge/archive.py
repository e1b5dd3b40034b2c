"""The second copy of the log, in Postgres: every entry as it was written, chained by hashes, only added to.

It is copied from the log by the archivist, compared with it by ``forge log verify``, and gives it back by
``forge log restore``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import asyncpg
import msgspec

from forge.database import Connection, answering
from forge.domain.chain import Entry, Link, link, links
from forge.domain.wholeness import gap
from forge.errors import ArchiveDamaged, Conflict, LogDamaged

PAGE = 1000

_HEAD = "select seq, chain from forge_log.entry order by seq desc limit 1"

_ADD = """
insert into forge_log.entry (seq, subject, headers, data, arrived, chain)
select * from unnest(
    $1::bigint[], $2::text[], $3::text[]::jsonb[], $4::bytea[], $5::timestamptz[], $6::bytea[])
"""

_PAGE = """
select seq, subject, headers, data, arrived, chain from forge_log.entry
where seq > $1 and seq <= $2 order by seq limit $3
"""


async def head(connection: Connection) -> Link:
    """Where the copy ends."""
    row = await connection.fetchrow(_HEAD)
    return Link(row["seq"], row["chain"]) if row else Link()


async def at(connection: Connection, seq: int) -> Link:
    """The place of an entry, 0 for before the first.

    Raises:
        ArchiveDamaged: there is no such entry.
    """
    if not seq:
        return Link()
    row = await connection.fetchrow("select seq, chain from forge_log.entry where seq = $1", seq)
    if row is None:
        raise ArchiveDamaged(seq, "it is missing")
    return Link(row["seq"], row["chain"])


async def add(connection: Connection, after: Link, entries: Sequence[Entry]) -> Link:
    """Add entries behind the end; the new end.

    Raises:
        Conflict: somebody else has added them.
        LogDamaged: they do not follow the end one by one.
    """
    wrong = gap(after.seq, entries)
    if wrong is not None:
        raise LogDamaged(wrong)
    chained = links(after, entries)
    try:
        await connection.execute(
            _ADD,
            [entry.seq for entry in entries],
            [entry.subject for entry in entries],
            [msgspec.json.encode(entry.headers).decode() for entry in entries],
            [entry.data for entry in entries],
            [entry.arrived for entry in entries],
            [place.hash for place in chained],
        )
    except asyncpg.UniqueViolationError as error:
        raise Conflict(f"another archivist added event {entries[0].seq}") from error
    return chained[-1] if chained else after


async def read(
    connection: Connection, upto: int = 2**62, *, after: Link | None = None
) -> AsyncIterator[list[Entry]]:
    """The copy in order, a page at a time, from behind a place in the chain; every hash is computed again.

    Raises:
        ArchiveDamaged: an entry is missing, or is not what was written.
        DatabaseUnavailable: no answer.
    """
    place = after or Link()
    while True:
        async with answering():
            rows = await connection.fetch(_PAGE, place.seq, upto, PAGE)
        if not rows:
            return
        entries = []
        for row in rows:
            entry = Entry(row["seq"], row["subject"], row["headers"], row["data"], row["arrived"])
            if entry.seq != place.seq + 1:
                raise ArchiveDamaged(place.seq + 1, f"it is missing; event {entry.seq} comes next")
            place = link(place, entry)
            if place.hash != row["chain"]:
                raise ArchiveDamaged(entry.seq, "its hash is another: it, or one before it, was changed")
            entries.append(entry)
        yield entries
