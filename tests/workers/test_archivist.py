"""The archivist between a real log and a real Postgres: everything once, in order, whatever happens."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
from nats.aio.client import Client

from endless import beside
from factories import job_id, meta, submitted
from forge import archive, database, follower, topology
from forge.broker import request
from forge.database import Pool
from forge.domain.chain import Entry
from forge.embedded import EmbeddedNats, EmbeddedPostgres
from forge.errors import LogDamaged
from forge.events.catalogue import encode
from forge.eventstore import Draft, EventStore
from forge.workers import archivist
from waiting import wait_until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "_HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(follower, "_SILENT_SECONDS", 0.9)


def copying(server: EmbeddedNats, pool: Pool) -> AbstractAsyncContextManager[asyncio.Task[None]]:
    return beside(server, "archivist", lambda nc: archivist.run(nc, pool))


async def write(events: EventStore, count: int, user: str) -> list[tuple[str, bytes]]:
    """Submissions of a new user in one batch; what was written."""
    drafts = [Draft(submitted(job_id(nth + 1), user), meta(f"{user} {nth}")) for nth in range(count)]
    drafts[0] = Draft(drafts[0].event, drafts[0].meta, topology.admissions(user))
    records = await events.append(drafts, within=60)
    return [(str(record.meta.id), encode(record.event)) for record in records]


async def reaches(pool: Pool, seq: int) -> list[Entry]:
    """The copy once it has come so far."""

    async def there() -> bool:
        try:
            async with database.answering(), asyncio.timeout(2):
                return (await pool.fetchval("select max(seq) from forge_log.entry") or 0) >= seq
        except (TimeoutError, database.DatabaseUnavailable):
            return False

    await wait_until(there, 60, f"the copy reaches {seq}")
    async with pool.acquire() as connection:
        return [entry async for page in archive.read(connection) for entry in page]


async def test_what_was_written_is_copied_and_what_cannot_be_read_too(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, events: EventStore
) -> None:
    wanted = await write(events, 30, "mei")
    await nats_client.request("forge.evt.admission.mallory", b"\x00\xff", timeout=10)
    async with copying(nats_server, pool):
        await reaches(pool, 31)
        wanted += [("", b"\x00\xff"), *(await write(events, 5, "lin"))]
        entries = await reaches(pool, 36)
    assert [(entry.event_id, entry.data) for entry in entries] == wanted
    assert not any(name.startswith("Nats-") for entry in entries for name in entry.headers)
    direct = await nats_client.request("$JS.API.DIRECT.GET.FORGE_EVENTS", b'{"seq": 7}', timeout=10)
    told = (direct.headers or {})["Nats-Time-Stamp"]
    assert told.startswith(entries[6].arrived.isoformat().removesuffix("+00:00").rstrip("0"))


async def test_two_archivists_copy_everything_once(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore
) -> None:
    async with copying(nats_server, pool) as one, copying(nats_server, pool) as other:
        wanted = [pair for user in ("mei", "lin", "wu") for pair in await write(events, 20, user)]
        entries = await reaches(pool, 60)
        assert not one.done()
        assert not other.done()
    assert [(entry.event_id, entry.data) for entry in entries] == wanted


async def test_servers_that_are_killed_are_copied_on(
    nats_server: EmbeddedNats, events: EventStore, open_directory: Path
) -> None:
    """A Postgres that crashed may have lost what it had last; the copy goes on from what it has."""
    server = EmbeddedPostgres(open_directory / "own-archive", settings={"fsync": "off"})
    server.start()
    try:
        await database.migrate(server.dsn())
        async with database.opened(server.dsn()) as pool, copying(nats_server, pool) as task:
            await reaches(pool, len(await write(events, 9, "before")))
            server.kill()
            nats_server.kill()
            nats_server.start()
            await write(events, 9, "while")
            server.start()
            assert len(await reaches(pool, 18)) == 18
            assert not task.done()
    finally:
        server.stop()


async def test_another_log_is_not_copied_behind_the_first(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, events: EventStore
) -> None:
    async with copying(nats_server, pool):
        before = await reaches(pool, len(await write(events, 3, "mei")))
    await request(nats_client, "STREAM.DELETE.FORGE_EVENTS")
    await topology.apply(nats_client)
    await write(events, 9, "lin")
    async with copying(nats_server, pool) as task:
        await asyncio.wait({task}, timeout=30)
        with pytest.raises(LogDamaged, match="another log: its event 1 is"):
            task.result()
    assert await reaches(pool, 3) == before
