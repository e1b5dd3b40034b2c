"""The guard between a real log and a real Postgres: what it lets pass, and why it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import asyncpg
import pytest
from nats.aio.client import Client

import damage
from factories import job_id, meta, submitted
from folding import ALL, fold
from forge import archive, bootstrap, database, guard, topology
from forge.broker import connect, request
from forge.database import Connection
from forge.domain.wholeness import Extent
from forge.embedded import EmbeddedNats
from forge.errors import DatabaseUnavailable, LogDamaged
from forge.events.envelope import Recorded
from forge.eventstore import Draft, EventStore
from forge.follower import follow_written
from forge.settings import Settings

NOBODY = "postgresql://forge@127.0.0.1:9/forge"


@pytest.fixture
async def connection(database_dsn: str) -> AsyncIterator[Connection]:
    async with database.opened(database_dsn) as pool, pool.acquire() as connection:
        yield connection


async def write(events: EventStore, count: int, command: str = "submit") -> list[Recorded]:
    """Submissions of one user each."""
    found: list[Recorded] = []
    for nth in range(count):
        user = f"{command}{nth}"
        draft = Draft(submitted(job_id(nth + 1), user), meta(user), topology.admissions(user))
        found += await events.append([draft])
    return found


async def remade(nc: Client) -> None:
    """Another log of the same name, as a server on a new disk would have."""
    await request(nc, "STREAM.DELETE.FORGE_EVENTS")
    await topology.apply(nc)


def flipped(command: str) -> Callable[[EmbeddedNats], None]:
    """A bit of the event that this command made."""
    return lambda server: damage.flip(server, str(meta(command).id).encode())


async def refused(events: EventStore, connection: Connection | None) -> str:
    with pytest.raises(LogDamaged) as raised:
        await guard.check(events, connection)
    assert "docs/RUNBOOK.md" in raised.value.detail
    return raised.value.detail


async def test_an_empty_log_and_an_empty_database_fit(events: EventStore, connection: Connection) -> None:
    await guard.check(events, connection)


async def test_a_full_log_fits_an_empty_database_and_tables_that_are_behind(
    events: EventStore, connection: Connection
) -> None:
    records = await write(events, 6)
    await guard.check(events, connection)
    await fold(connection, records[:3], [3])
    await guard.check(events, connection)


async def test_what_is_written_and_copied_while_it_looks_is_no_damage(
    nats_client: Client, events: EventStore, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await write(events, 2)
    ask = guard.extent

    async def and_then_go_on(events: EventStore) -> Extent:
        there = await ask(events)
        await write(events, 2, "meanwhile")
        async with aclosing(follow_written(nats_client, 1)) as batches:
            async for batch in batches:
                await archive.add(connection, await archive.head(connection), batch.entries)
                if batch.caught_up:
                    return there
        raise AssertionError("it follows for ever")

    monkeypatch.setattr(guard, "extent", and_then_go_on)
    await guard.check(events, connection)


@pytest.mark.fault("D7")
async def test_an_empty_log_does_not_fit_a_full_database(
    nats_client: Client, events: EventStore, connection: Connection
) -> None:
    await fold(connection, await write(events, 3), [3])
    await remade(nats_client)
    assert f"it is empty, and the checkpoint of {ALL[0].name} has event 3" in await refused(
        events, connection
    )


@pytest.mark.fault("D7")
async def test_a_shorter_log_is_told_from_another_one(
    nats_client: Client, events: EventStore, connection: Connection
) -> None:
    await fold(connection, await write(events, 5), [5])
    await remade(nats_client)
    await write(events, 4)
    assert "it ends at event 4" in await refused(events, connection)
    await remade(nats_client)
    await write(events, 5, "other")
    assert "it is another log: its event 5" in await refused(events, connection)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (damage.cut, "of its events between 1 and 9 are gone"),
        (flipped("submit8"), "event 9 cannot be read"),
        (flipped("submit0"), "event 1 cannot be read"),
    ],
    ids=["cut", "last", "first"],
)
@pytest.mark.fault("D7")
async def test_a_damaged_block_is_noticed_without_any_memory_of_it(
    nats_server: EmbeddedNats, events: EventStore, harm: Callable[[EmbeddedNats], None], said: str
) -> None:
    await write(events, 9)
    async with damage.after(nats_server, harm) as log:
        assert said in await refused(log, None)


async def test_a_checkpoint_on_a_damaged_event_is_noticed(
    nats_server: EmbeddedNats, events: EventStore, connection: Connection
) -> None:
    await fold(connection, (await write(events, 9))[:5], [5])
    async with damage.after(nats_server, flipped("submit4")) as log:
        assert "event 5 cannot be read" in await refused(log, connection)


async def test_a_stream_that_the_server_could_not_read_is_not_made_anew(
    nats_client: Client, settings: Settings, events: EventStore, connection: Connection
) -> None:
    await fold(connection, await write(events, 3), [3])
    await request(nats_client, "STREAM.DELETE.FORGE_EVENTS")
    with pytest.raises(LogDamaged, match="it is empty"):
        await bootstrap.setup(settings)
    assert b"FORGE_EVENTS" not in await request(nats_client, "STREAM.NAMES")


async def test_a_start_without_postgres_looks_at_the_log_alone(
    nats_server: EmbeddedNats, nats_client: Client, events: EventStore
) -> None:
    with pytest.raises(DatabaseUnavailable, match="the log is empty; was it ever otherwise"):
        await guard.at_start(events, NOBODY)
    await write(events, 9)
    await guard.at_start(events, NOBODY)
    async with damage.after(nats_server, damage.cut) as log:
        with pytest.raises(LogDamaged):
            await guard.at_start(log, NOBODY)


async def test_tables_that_are_not_made_yet_remember_nothing(
    nats_server: EmbeddedNats, empty_database_dsn: str
) -> None:
    nc = await connect(nats_server.url, "test")
    try:
        await guard.at_start(EventStore(nc), empty_database_dsn)
        await topology.apply(nc)
        await write(EventStore(nc), 2)
        await guard.at_start(EventStore(nc), empty_database_dsn)
    finally:
        await nc.close()


async def test_a_checkpoint_from_before_ids_were_kept_still_counts(
    nats_client: Client, events: EventStore, database_dsn: str, connection: Connection
) -> None:
    await fold(connection, await write(events, 3), [3])
    await connection.execute("update projection_checkpoint set event_id = null")
    await guard.check(events, connection)
    await remade(nats_client)
    await write(events, 2)
    other = await asyncpg.connect(database_dsn)
    try:
        assert "it ends at event 2" in await refused(events, other)
    finally:
        await other.close()
