"""The projector between a real log and a real Postgres, either of which may die."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

import damage
from endless import beside
from factories import cancelled, job_id, meta, sampled, started, submitted
from folding import ALL, fold, tables
from forge import database, follower, topology
from forge.broker import request
from forge.database import Pool
from forge.embedded import EmbeddedNats, EmbeddedPostgres
from forge.errors import LogDamaged, LogUnreadable
from forge.events.envelope import headers
from forge.eventstore import Draft, EventStore
from forge.workers import projector
from waiting import wait_until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "_HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(follower, "_SILENT_SECONDS", 0.9)


def projecting(nats_server: EmbeddedNats, pool: Pool) -> AbstractAsyncContextManager[asyncio.Task[None]]:
    return beside(nats_server, "projector", lambda nc: projector.run(nc, pool))


async def write(events: EventStore, count: int, user: str) -> int:
    """Jobs of a new user, each submitted, then started or cancelled; returns the last sequence."""
    ledger, seq = topology.admissions(user), 0
    first = 1000 * int.from_bytes(user.encode()) % 2**40
    for nth in range(first, first + count):
        job = job_id(nth)
        [record] = await events.append(
            [Draft(submitted(job, user), meta(f"submit {nth}"), ledger, seq)], within=60
        )
        seq = record.seq
        fact = cancelled(job, user) if nth % 2 else started(job, user)
        [record] = await events.append(
            [Draft(fact, meta(f"fact {nth}"), topology.job(user, job), 0)], within=60
        )
    return record.seq


async def reaches(pool: Pool, seq: int) -> None:
    """Wait until the tables tell of this event."""

    async def there() -> bool:
        try:
            async with database.answering(), asyncio.timeout(2):
                position = await pool.fetchval(
                    "select coalesce(min(seq), 0) from projection_checkpoint where projection <> 'usage'"
                )
        except (TimeoutError, database.DatabaseUnavailable):
            return False
        return bool(position >= seq)

    await wait_until(there, 60, f"the tables reach {seq}")


async def same_as_folded_by_hand(pool: Pool, events: EventStore) -> None:
    """The tables hold what the log says, taken in one by one."""
    records = [await events.at(seq) for seq in range(1, await events.head() + 1)]
    async with pool.acquire() as connection:
        projected = await tables(connection)
        for name in projected:
            await connection.execute(f"truncate {name}")
        await fold(connection, [record for record in records if record], [7])
        assert await tables(connection) == projected


async def test_the_tables_follow_the_log(nats_server: EmbeddedNats, pool: Pool, events: EventStore) -> None:
    await write(events, 20, "before")
    async with projecting(nats_server, pool):
        await reaches(pool, await write(events, 20, "while"))
    await same_as_folded_by_hand(pool, events)


async def test_a_sample_has_its_own_stream_and_checkpoint(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, events: EventStore
) -> None:
    last = await write(events, 3, "mei")
    where = topology.subject(sampled())
    await nats_client.request(
        where, msgspec.json.encode(sampled()), headers=headers(sampled(), meta(), where), timeout=10
    )
    async with projecting(nats_server, pool):
        await reaches(pool, last)
        await wait_until(lambda: pool.fetchval("select count(*) from resource_usage_log"))
        positions = "select projection, seq from projection_checkpoint"
        found = {row["projection"]: row["seq"] for row in await pool.fetch(positions)}
    assert found == {"queue": 6, "inventory": 6, "stats": 6, "uploads": 6, "usage": 1}


async def test_readers_are_told_how_far_the_tables_are(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, events: EventStore
) -> None:
    told: list[int] = []

    async def heard(message: object) -> None:
        told.append(msgspec.json.decode(message.data)["seq"])  # type: ignore[attr-defined]

    await nats_client.subscribe(topology.CHECKPOINT, cb=heard)
    async with projecting(nats_server, pool):
        last = await write(events, 5, "mei")
        await wait_until(lambda: last in told)
    assert told == sorted(told)


async def test_readers_are_not_told_of_tables_that_a_rebuilt_one_is_behind(
    nats_server: EmbeddedNats,
    nats_client: Client,
    pool: Pool,
    events: EventStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader that waits for what it wrote would be shown one table with it and one without."""
    async with projecting(nats_server, pool):
        before = await write(events, 5, "mei")
        await reaches(pool, before)
    begun, told = asyncio.Event(), asyncio.Queue[int]()

    async def rebuild(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def heard(message: Msg) -> None:
        told.put_nowait(msgspec.json.decode(message.data)["seq"])

    await nats_client.subscribe(topology.CHECKPOINT, cb=heard)
    monkeypatch.setattr(projector, "rebuild", rebuild)
    monkeypatch.setattr(projector.queue, "version", projector.queue.version + 1)
    async with projecting(nats_server, pool):
        await begun.wait()
        last = await write(events, 5, "lin")
        await wait_until(lambda: _at(pool, "inventory", last), what="the others go on")
        await nats_client.flush()
    assert told.empty()
    assert await _at(pool, "queue", before)


async def _at(pool: Pool, projection: str, seq: int) -> bool:
    sql = "select seq from projection_checkpoint where projection = $1"
    return bool(await pool.fetchval(sql, projection) == seq)


@pytest.mark.fault("C1")
async def test_tables_of_a_newer_forge_are_left_to_it(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore, caplog: pytest.LogCaptureFixture
) -> None:
    async with projecting(nats_server, pool):
        before = await write(events, 5, "mei")
        await reaches(pool, before)
    await pool.execute("update projection_checkpoint set version = 9 where projection = 'queue'")
    last = await write(events, 1, "lin")
    reason = "looks after the tables of queue: upgrade this one"
    async with projecting(nats_server, pool):
        await wait_until(lambda: any(reason in getattr(r, "reason", "") for r in caplog.records), what=reason)
        assert await _at(pool, "inventory", before)
        await pool.execute("update projection_checkpoint set version = $1 where projection = 'queue'", 1)
        await reaches(pool, last)


@pytest.mark.fault("K4")
async def test_two_projectors_write_everything_once(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore
) -> None:
    async with projecting(nats_server, pool), projecting(nats_server, pool):
        for user in ("mei", "lin", "wu"):
            last = await write(events, 15, user)
        await reaches(pool, last)
    await same_as_folded_by_hand(pool, events)


async def test_a_projector_that_starts_again_goes_on(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore
) -> None:
    for user in ("mei", "lin", "wu"):
        async with projecting(nats_server, pool):
            last = await write(events, 10, user)
    async with projecting(nats_server, pool):
        await reaches(pool, last)
    await same_as_folded_by_hand(pool, events)


async def test_a_log_that_is_killed_is_read_on(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore
) -> None:
    async with projecting(nats_server, pool):
        await reaches(pool, await write(events, 5, "before"))
        writing = asyncio.create_task(write(events, 20, "while"))
        nats_server.kill()
        nats_server.start()
        await reaches(pool, await writing)
    await same_as_folded_by_hand(pool, events)


@pytest.mark.parametrize("how", ["stop", "kill"])
@pytest.mark.fault("K6")
async def test_a_postgres_that_goes_and_comes_is_written_on(
    nats_server: EmbeddedNats, events: EventStore, open_directory: Path, how: str
) -> None:
    """It commits without waiting for its disk: what a crash takes, rows and checkpoint, is taken in again."""
    server = EmbeddedPostgres(open_directory / f"own-{how}", settings={"fsync": "off"})
    server.start()
    try:
        await database.migrate(server.dsn())
        async with database.opened(server.dsn()) as pool, projecting(nats_server, pool) as task:
            await reaches(pool, await write(events, 5, "before"))
            writing = asyncio.create_task(write(events, 20, "while"))
            getattr(server, how)()
            last = await writing
            server.start()
            await reaches(pool, last)
            await reaches(pool, await write(events, 5, "later"))
            assert not task.done()
            await same_as_folded_by_hand(pool, events)
    finally:
        server.stop()


async def refuses(task: asyncio.Task[None]) -> str:
    """Why a projector ended."""
    await asyncio.wait({task}, timeout=30)
    with pytest.raises(ExceptionGroup) as raised:
        task.result()
    [damaged] = raised.value.exceptions
    assert isinstance(damaged, LogDamaged)
    return damaged.detail


async def test_a_log_that_was_shortened_is_refused(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, events: EventStore
) -> None:
    async with projecting(nats_server, pool):
        await reaches(pool, await write(events, 5, "mei"))
    await request(nats_client, "STREAM.DELETE.FORGE_EVENTS")
    await topology.apply(nats_client)
    async with projecting(nats_server, pool) as task:
        assert "it is empty, and the checkpoint of" in await refuses(task)


async def test_a_hole_ahead_of_the_checkpoint_is_refused_with_everything_before_it_in(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore
) -> None:
    await write(events, 5, "mei")
    hidden = await events.at(8)
    assert hidden is not None
    nats_server.stop()
    damage.flip(nats_server, str(hidden.meta.id).encode())
    nats_server.start()
    async with projecting(nats_server, pool) as task:
        assert "event 9 comes right after event 7" in await refuses(task)


async def test_samples_that_began_anew_are_read_from_their_start(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, events: EventStore
) -> None:
    where, taken = topology.subject(sampled()), "select count(*) = {} from resource_usage_log"

    async def sample(name: str) -> None:
        given = headers(sampled(), meta(name), where)
        await nats_client.request(where, msgspec.json.encode(sampled()), headers=given, timeout=10)

    async with projecting(nats_server, pool):
        for name in ("one", "two"):
            await sample(name)
        await wait_until(lambda: pool.fetchval(taken.format(2)))
    await request(nats_client, f"STREAM.DELETE.{topology.METRICS}")
    await topology.apply(nats_client)
    await sample("three")
    async with projecting(nats_server, pool):
        await wait_until(lambda: pool.fetchval(taken.format(3)))


@pytest.mark.fault("B3")
async def test_what_cannot_be_read_stops_it_by_sequence_with_everything_before_it_in(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, events: EventStore
) -> None:
    last = await write(events, 3, "mei")
    await nats_client.request("forge.evt.admission.mallory", b"\x00", timeout=10)
    await write(events, 3, "lin")
    async with projecting(nats_server, pool) as task:
        await asyncio.wait({task}, timeout=30)
        assert isinstance(task.exception(), ExceptionGroup)
        with pytest.raises(ExceptionGroup) as raised:
            task.result()
    [unreadable] = raised.value.exceptions
    assert isinstance(unreadable, LogUnreadable)
    assert f"message {last + 1}" in unreadable.detail
    async with pool.acquire() as connection:
        assert [await p.position(connection) for p in ALL] == [last] * len(ALL)


@pytest.mark.fault("B3")
async def test_what_postgres_cannot_hold_stops_it_by_sequence(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore
) -> None:
    """A zero byte passes JSON and breaks Postgres; the edge refuses it, and no one can skip it here."""
    last = await write(events, 2, "mei")
    poison = submitted(job_id(7), "mallory", params={"prompt": "a\0b"})
    [record] = await events.append([Draft(poison, meta("poison"), topology.admissions("mallory"), 0)])
    async with projecting(nats_server, pool) as task:
        await asyncio.wait({task}, timeout=30)
        with pytest.raises(ExceptionGroup) as raised:
            task.result()
    assert isinstance(raised.value.exceptions[0], LogUnreadable)
    assert f"message {record.seq}" in str(raised.value.exceptions[0])
    async with pool.acquire() as connection:
        assert [await p.position(connection) for p in ALL] == [last] * len(ALL)
