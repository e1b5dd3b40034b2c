"""The second copy in a real Postgres: it gives back what it got, only grows, tells what changed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta

import asyncpg
import pytest

from factories import NOW
from forge import archive, database
from forge.database import Connection
from forge.domain.chain import Entry, Link, links
from forge.errors import ArchiveDamaged, Conflict, LogDamaged

FREE = "set session_replication_role = replica"  # as somebody who may do anything


@pytest.fixture
async def connection(database_dsn: str) -> AsyncIterator[Connection]:
    async with database.opened(database_dsn) as pool, pool.acquire() as connection:
        yield connection


def entry(seq: int) -> Entry:
    headers = {"ce-id": f"id-{seq}", "ce-type": "职"}
    return Entry(seq, f"forge.evt.admission.u{seq}", headers, bytes([seq % 256, 0, 255]), at(seq))


def at(seq: int) -> datetime:
    return NOW + timedelta(seconds=seq, microseconds=seq)


async def everything(connection: Connection, upto: int = 2**62) -> list[Entry]:
    return [entry async for page in archive.read(connection, upto) for entry in page]


async def test_it_gives_back_what_it_was_given(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "PAGE", 3)
    entries = [entry(seq) for seq in range(1, 9)]
    assert await archive.head(connection) == Link()
    middle = await archive.add(connection, Link(), entries[:5])
    end = await archive.add(connection, middle, entries[5:])
    assert end == await archive.head(connection) == links(Link(), entries)[-1]
    assert await everything(connection) == entries
    assert await everything(connection, 4) == entries[:4]
    assert [e async for page in archive.read(connection, after=middle) for e in page] == entries[5:]


async def test_it_takes_no_entry_twice_and_skips_none(connection: Connection) -> None:
    place = await archive.add(connection, Link(), [entry(1), entry(2)])
    with pytest.raises(Conflict):
        await archive.add(connection, Link(), [entry(1)])
    with pytest.raises(LogDamaged, match="event 4 comes right after event 2"):
        await archive.add(connection, place, [entry(4)])
    assert (await archive.head(connection)).seq == 2


@pytest.mark.parametrize(
    "statement",
    ["update forge_log.entry set data = ''", "delete from forge_log.entry", "truncate forge_log.entry"],
)
async def test_it_is_only_added_to(connection: Connection, statement: str) -> None:
    await archive.add(connection, Link(), [entry(1)])
    with pytest.raises(asyncpg.RaiseError, match="only ever added to"):
        await connection.execute(statement)
    assert await everything(connection) == [entry(1)]


@pytest.mark.parametrize(
    ("harm", "seq"),
    [
        ("update forge_log.entry set data = '' where seq = 3", 3),
        ('update forge_log.entry set headers = headers || \'{"ce-id": "x"}\' where seq = 4', 4),
        ("update forge_log.entry set arrived = now() where seq = 1", 1),
        ("update forge_log.entry set chain = sha256('x') where seq = 2", 2),
        ("delete from forge_log.entry where seq = 2", 2),
        ("delete from forge_log.entry where seq = 1", 1),
    ],
)
async def test_the_first_entry_that_does_not_fit_is_named(
    connection: Connection, harm: str, seq: int
) -> None:
    await archive.add(connection, Link(), [entry(seq) for seq in range(1, 6)])
    await connection.execute(FREE)
    await connection.execute(harm)
    with pytest.raises(ArchiveDamaged, match=f"at event {seq}:") as raised:
        await everything(connection)
    assert raised.value.seq == seq
