"""Tables rebuilt from the log beside the live ones, while a projector goes on and readers read."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import asyncpg
import msgspec
import pytest
from click.testing import CliRunner
from nats.aio.client import Client

import factories as make
from endless import beside
from factories import job_id, meta
from folding import tables
from forge import database, replaying, topology
from forge.cli import cli
from forge.database import Pool
from forge.embedded import EmbeddedNats
from forge.errors import LogDamaged, ReplayRefused
from forge.events.catalogue import Event
from forge.events.envelope import headers
from forge.projections import reading
from forge.projections.projection import Projection
from forge.projections.shadow import BEFORE, SHADOW
from forge.replaying import Rebuilt, Step, rebuild
from forge.workers import projector
from forge.workers.projector import PROJECTIONS
from waiting import wait_until

JOBS = 40
ROUNDS = 12
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that have longer than a request has: what is slow is not missing."""
    monkeypatch.setattr(reading, "SECONDS", PATIENCE)


def projecting(nats_server: EmbeddedNats, pool: Pool) -> AbstractAsyncContextManager[asyncio.Task[None]]:
    return beside(nats_server, "projector", lambda nc: projector.run(nc, pool))


def story(nth: int, user: str) -> list[Event]:
    """A job of one of many fates, and what became of its picture."""
    job, picture = job_id(nth), f"{nth % 7}" * 64
    begun: list[Event] = [make.submitted(job, user, priority=nth % 10 + 1), make.started(job, user)]
    drawn: list[Event] = [
        make.stored(job, content_hash=picture, expires_at=make.after(nth * 60), session_id="s"),
        make.ready(job, content_hash=picture),
        make.completed(job, user, run_ms=nth * 70),
        make.accessed(make.reads(user, picture, nth + 1, last_at=make.after(nth))),
    ]
    match nth % 6:
        case 0:
            return [*begun, make.cancelled(job, user)]
        case 1:
            return [*begun, make.attempt_failed(job, user), make.failed(job, user), make.retried(job, user)]
        case 2:
            return [*begun, *drawn, make.deleted(job, content_hash=picture)]
        case 3:
            return [make.submitted(job, user), *drawn[2:], make.upload_stored(content_hash=picture)]
        case 4:
            return [*begun, *drawn, make.pinned(job, content_hash=picture)]
        case _:
            return [*begun, *drawn]


async def write(nc: Client, jobs: Iterable[int], user: str = "mei") -> int:
    """The jobs' stories into the log, as they stand; the last sequence."""
    for nth in jobs:
        for place, fact in enumerate(story(nth, user)):
            seq = await put(nc, fact, f"{user} {nth} {place}")
    return seq


async def put(nc: Client, fact: Event, name: str) -> int:
    where = topology.subject(fact)
    answer = await nc.request(
        where, msgspec.json.encode(fact), headers=headers(fact, meta(name), where), timeout=30
    )
    return int(msgspec.json.decode(answer.data)["seq"])


async def reaches(pool: Pool, seq: int) -> None:
    async def there() -> bool:
        try:
            return await reading.position(pool) >= seq
        except database.DatabaseUnavailable:
            return False

    await wait_until(there, PATIENCE, f"the tables reach {seq}")


async def emptied(pool: Pool) -> None:
    """All tables away at once. Whoever writes to them meanwhile may want them in another order: of two who
    wait for each other Postgres ends one, and that may be us."""

    async def done() -> bool:
        try:
            await pool.execute("drop schema public cascade")
        except asyncpg.DeadlockDetectedError:
            return False
        return True

    await wait_until(done, what="the schema is gone")


@asynccontextmanager
async def replay_that_waits(nc: Client, pool: Pool, dsn: str) -> AsyncIterator[asyncio.Task[Rebuilt]]:
    """A replay that has come to its swap, where somebody holds a table until this ends."""
    holder = await asyncpg.connect(dsn)
    transaction = holder.transaction()
    await transaction.start()
    await holder.fetchval("select count(*) from asset_inventory")
    swapping = asyncio.Event()

    def seen(step: Step) -> None:
        if step.what == "swapping":
            swapping.set()

    replay = asyncio.create_task(rebuild(nc, pool, PROJECTIONS, progress=seen))
    try:
        await wait_until(lambda: swapping.is_set() or replay.done(), 60, "it swaps")
        yield replay
    finally:
        await transaction.rollback()
        await holder.close()


async def everything(pool: Pool) -> dict[str, list[str]]:
    async with pool.acquire() as connection:
        return await tables(connection, PROJECTIONS)


async def indexes(pool: Pool, schema: str = "public") -> list[tuple[str, ...]]:
    """Everything about the tables beside their rows."""
    found = await pool.fetch(
        "select tablename, indexname, indexdef from pg_indexes where schemaname = $1 order by 2", schema
    )
    found += await pool.fetch(
        "select c.relname, conname, pg_get_constraintdef(k.oid) from pg_constraint k"
        " join pg_class c on c.oid = k.conrelid where k.connamespace = $1::regnamespace order by 1, 2",
        schema,
    )
    found += await pool.fetch(
        "select relname, relpersistence::text, coalesce(array_to_string(reloptions, ','), ''),"
        " coalesce(relacl::text, '') from pg_class"
        " where relnamespace = $1::regnamespace and relkind = 'r' order by 1",
        schema,
    )
    found += await pool.fetch(
        "select table_name, column_name, concat_ws(' ', data_type, column_default, generation_expression,"
        " is_nullable, collation_name) from information_schema.columns where table_schema = $1 order by 1, 2",
        schema,
    )
    return [tuple(row) for row in found]


async def test_what_is_rebuilt_is_what_was_there(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool
) -> None:
    if not await pool.fetchval("select count(*) from pg_roles where rolname = 'reader_of_tables'"):
        await pool.execute("create role reader_of_tables")
    await pool.execute("grant select on asset_inventory to reader_of_tables")
    for nth in range(120):
        await put(nats_client, make.sampled(value=nth), f"sample {nth}")
    async with projecting(nats_server, pool):
        last = await write(nats_client, range(JOBS))
        await reaches(pool, last)
        await wait_until(lambda: pool.fetchval("select count(*) = 120 from resource_usage_log"))
        before, made = await everything(pool), await indexes(pool)
        rebuilt = await rebuild(nats_client, pool, PROJECTIONS)
        assert await everything(pool) == before
        assert await indexes(pool) == made
        assert set(rebuilt.compared) == {p.name for p in PROJECTIONS}
        assert (rebuilt.differences, rebuilt.kept) == ((), False)
        assert rebuilt.seq == {topology.EVENTS: last, topology.METRICS: 120}
        assert await schemas(pool) == []
        assert min(len(rows) for rows in before.values()) > 0, "an empty table shows nothing"
        await reaches(pool, await write(nats_client, range(JOBS, JOBS + 5)))


async def schemas(pool: Pool) -> list[str]:
    """Those of ours that are there."""
    found = await pool.fetch("select nspname from pg_namespace where nspname = any($1)", [SHADOW, BEFORE])
    return sorted(row[0] for row in found)


async def test_one_projection_is_rebuilt_beside_the_others(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool
) -> None:
    async with projecting(nats_server, pool):
        await reaches(pool, await write(nats_client, range(10)))
        oids = "select relname, oid from pg_class where relname in ('generation_queue', 'asset_inventory')"
        before = {row[0]: row[1] for row in await pool.fetch(oids)}
        await rebuild(nats_client, pool, [p for p in PROJECTIONS if p.name == "inventory"])
        after = {row[0]: row[1] for row in await pool.fetch(oids)}
        assert after["generation_queue"] == before["generation_queue"]
        assert after["asset_inventory"] != before["asset_inventory"]
        await reaches(pool, await write(nats_client, range(10, 20)))


async def test_while_new_jobs_complete_readers_never_miss_a_table_or_a_row(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool
) -> None:
    """Prepared statements live on over the swap, and the tables never go back."""
    ended = False

    async def writes() -> int:
        nth = 100
        while not ended:
            last = await write(nats_client, [nth])
            nth += 1
        return last

    async def reads() -> int:
        looks = newest = 0
        while not ended:
            async with reading.looking(pool) as look:
                assert look.seq >= newest
                newest = look.seq
                row = await look.connection.fetchrow(
                    "select count(*) as jobs, coalesce(max(seq), 0) as seq from generation_queue"
                )
                stored = await look.connection.fetchval("select count(*) from asset_inventory")
                assert row is not None
                assert row["jobs"] >= 10
                assert stored > 0
            looks += 1
        return looks

    async with projecting(nats_server, pool):
        await reaches(pool, await write(nats_client, range(10)))
        async with asyncio.TaskGroup() as group:
            writing = group.create_task(writes())
            readers = [group.create_task(reads()) for _ in range(3)]
            for _ in range(4):
                rebuilt = await rebuild(nats_client, pool, PROJECTIONS)
                assert rebuilt.differences == ()
                assert "queue" in rebuilt.compared
            ended = True
        assert min(reader.result() for reader in readers) > 20
        await reaches(pool, writing.result())
        before = await everything(pool)
        await rebuild(nats_client, pool, PROJECTIONS)
        assert await everything(pool) == before


async def test_a_difference_is_told_and_changes_nothing_until_one_says_so(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool
) -> None:
    async with projecting(nats_server, pool):
        await reaches(pool, await write(nats_client, range(10)))
        right = await everything(pool)
        await pool.execute(
            "update asset_inventory set width = 7 where id = (select id from asset_inventory limit 1)"
        )
        gone = await pool.fetchval("delete from generation_queue where id = $1 returning id", job_id(3))
        wrong = await everything(pool)
        with pytest.raises(ReplayRefused) as refused:
            await rebuild(nats_client, pool, PROJECTIONS)
        assert await everything(pool) == wrong
        assert str(gone) in refused.value.detail
        assert "generation_queue has 9 rows, rebuilt 10" in refused.value.detail
        assert "asset_inventory" in refused.value.detail
        assert "--replace" in refused.value.detail
        rebuilt = await rebuild(nats_client, pool, PROJECTIONS, replace=True)
        assert {one.table for one in rebuilt.differences} == {"generation_queue", "asset_inventory"}
        assert rebuilt.kept
        assert await everything(pool) == right
        assert await pool.fetchval(f"select count(*) from {BEFORE}.generation_queue") == 9
        assert await replaying.drop_old(pool)
        assert await schemas(pool) == []


async def test_of_two_at_once_the_second_is_refused(
    nats_server: EmbeddedNats,
    nats_client: Client,
    pool: Pool,
    database_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replaying, "_LOCK_SECONDS", 0.0)
    async with projecting(nats_server, pool):
        await reaches(pool, await write(nats_client, range(5)))
        async with replay_that_waits(nats_client, pool, database_dsn) as first:
            with pytest.raises(ReplayRefused, match="another replay is under way"):
                await rebuild(nats_client, pool, PROJECTIONS)
        assert (await first).differences == ()


async def test_one_that_was_cut_off_is_run_again(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool
) -> None:
    async with projecting(nats_server, pool):
        await reaches(pool, await write(nats_client, range(10)))
        before = await everything(pool)
        for phase in ("reading", "indexing", "comparing", "swapping"):

            def cut(step: Step, phase: str = phase) -> None:
                if step.what == phase:
                    raise KeyError(phase)

            with pytest.raises(KeyError):
                await rebuild(nats_client, pool, PROJECTIONS, progress=cut)
            assert await everything(pool) == before
        await rebuild(nats_client, pool, PROJECTIONS)
        assert await everything(pool) == before
        assert await schemas(pool) == []


async def test_somebody_who_holds_a_table_is_waited_for_and_holds_up_nobody(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, database_dsn: str
) -> None:
    async with projecting(nats_server, pool):
        await reaches(pool, await write(nats_client, range(10)))
        async with replay_that_waits(nats_client, pool, database_dsn) as replay:
            await reaches(pool, await write(nats_client, range(10, 20)))
            assert not replay.done()
        assert (await replay).differences == ()


async def test_a_view_that_would_show_the_old_rows_is_named(nats_client: Client, pool: Pool) -> None:
    await pool.execute("create view my_view as select id from asset_inventory")
    with pytest.raises(ReplayRefused, match="my_view"):
        await rebuild(nats_client, pool, PROJECTIONS)


async def test_without_a_projector_there_is_nothing_to_wait_for(nats_client: Client, pool: Pool) -> None:
    last = await write(nats_client, range(5))
    rebuilt = await rebuild(nats_client, pool, PROJECTIONS)
    assert (rebuilt.compared, rebuilt.kept) == ((), False)
    assert await reading.position(pool) == last


async def test_another_log_than_the_tables_came_from_is_refused(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool
) -> None:
    async with projecting(nats_server, pool):
        await reaches(pool, await write(nats_client, range(10)))
    before = await everything(pool)
    await nats_client.jetstream().delete_stream(topology.EVENTS)
    await topology.apply(nats_client)
    with pytest.raises(LogDamaged):
        await rebuild(nats_client, pool, PROJECTIONS, replace=True)
    assert await everything(pool) == before


# ------------------------------------------------------------ by the projector


def newer(name: str) -> Projection:
    [old] = [p for p in PROJECTIONS if p.name == name]
    made = Projection(old.name, version=old.version + 1, tables=old.tables, stream=old.stream)
    made.handlers = old.handlers
    return made


async def test_rows_of_an_older_version_are_rebuilt_beside_the_others(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with projecting(nats_server, pool):
        await reaches(pool, await write(nats_client, range(10)))
    right = await everything(pool)
    await pool.execute("update asset_inventory set width = 0")  # as an older version made them
    again: Any = tuple(newer("inventory") if p.name == "inventory" else p for p in PROJECTIONS)
    monkeypatch.setattr(projector, "PROJECTIONS", again)
    async with projecting(nats_server, pool), projecting(nats_server, pool):
        version = "select version = 2 from projection_checkpoint where projection = 'inventory'"
        await wait_until(lambda: pool.fetchval(version))
        assert (await everything(pool))["asset_inventory"] == right["asset_inventory"]
        await reaches(pool, await write(nats_client, range(10, 20)))
        assert await pool.fetchval("select count(*) from asset_inventory where width = 0") == 0
    with pytest.raises(ReplayRefused, match="upgrade"):
        await rebuild(nats_client, pool, [p for p in PROJECTIONS if p.name == "inventory"])


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.fault("D9")
async def test_an_emptied_database_is_filled_again(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    monkeypatch.setattr(replaying, "LONG", 10 if long else 10**9)
    monkeypatch.setattr(projector, "LOOK_SECONDS", 0.2)
    async with projecting(nats_server, pool):
        await put(nats_client, make.sampled(), "sample")
        await reaches(pool, await write(nats_client, range(20)))
        await wait_until(lambda: pool.fetchval("select count(*) from resource_usage_log"))
        before = await everything(pool)
        await emptied(pool)
        await reaches(pool, await write(nats_client, range(20, 21)))
        await wait_until(lambda: pool.fetchval("select count(*) from resource_usage_log"))
        after = await everything(pool)
        for name in ("asset_usage", "upload", "resource_usage_log"):
            assert set(before[name]) <= set(after[name])
        assert len(after["generation_queue"]) == 21


# ------------------------------------------------------------------ the command


async def test_a_database_may_be_emptied_at_any_moment(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "LOOK_SECONDS", 0.2)
    seq = await write(nats_client, range(5))
    async with projecting(nats_server, pool) as task:
        for nth in range(ROUNDS):
            await reaches(pool, seq)
            writing = asyncio.create_task(write(nats_client, range(10 + 5 * nth, 13 + 5 * nth)))
            await asyncio.sleep(nth * 0.01)  # each time a little later in what the projector does
            await emptied(pool)
            seq = await writing
            assert not task.done(), task
        await reaches(pool, seq)


def test_the_command_knows_every_projection() -> None:
    assert [p.name for p in PROJECTIONS] == list(sys.modules["forge.cli.replay"].PROJECTIONS)


@pytest.mark.parametrize("words", [[], ["nonsense"], ["all", "--drop-old"]])
def test_what_makes_no_sense_is_refused(words: list[str]) -> None:
    said = CliRunner().invoke(cli, ["replay", *words])
    assert said.exit_code == 2
    assert "Usage: " in said.output


async def test_the_command_says_what_it_did(
    nats_server: EmbeddedNats, nats_client: Client, pool: Pool, database_dsn: str
) -> None:
    async def replay(*words: str) -> tuple[int | None, str, str]:
        places = {"FORGE_NATS_URL": nats_server.url, "FORGE_POSTGRES_DSN": database_dsn}
        command = [sys.executable, "-m", "forge", "replay", *words]
        process = await asyncio.create_subprocess_exec(
            *command, env=os.environ | places, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    last = await write(nats_client, range(10))
    status, out, err = await replay("all")
    assert status == 0, err
    assert f"{last} events" in out
    assert "reading: " in err
    await pool.execute("delete from generation_queue")
    status, out, err = await replay("inventory")
    assert (status, "the same as before, byte for byte: inventory" in out) == (0, True), out + err
    status, out, err = await replay("queue", "--json")
    assert (status, out) == (2, "")
    assert "generation_queue has 0 rows, rebuilt 10" in err
    status, out, err = await replay("queue", "--replace")
    assert (status, "generation_queue had 0 rows and has 10 now" in out) == (0, True), err
    assert await replay("--drop-old") == (0, "the kept tables are gone\n", "")
    assert await replay("--drop-old") == (0, "no tables were kept\n", "")
