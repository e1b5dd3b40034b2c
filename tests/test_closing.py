"""Closing the book on real servers: what leaves the stream, what is still told, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest
from nats.aio.client import Client
from nats.errors import NoRespondersError

from factories import cancelled, expired, job_id, meta, ready, started, submitted
from folding import fold
from forge import archive, chronicle, closed, closing, database, guard, logbook, restoring, topology
from forge.broker import BrokerRefused, request
from forge.closing import Wanted
from forge.database import Connection, Pool
from forge.domain.closing import MARK
from forge.domain.ids import new_id
from forge.errors import (
    ArchiveDamaged,
    ClosingRefused,
    Conflict,
    FileUnfit,
    LogDamaged,
    LogUnavailable,
    RestoreRefused,
)
from forge.events.envelope import Recorded
from forge.eventstore import Draft, EventStore
from forge.follower import follow
from forge.topology import EVENTS, admissions, character, job, references, subject
from forge.workers.projector import PROJECTIONS
from waiting import wait_until

MINE = [projection for projection in PROJECTIONS if projection.stream == EVENTS]
COUNT = 30
THROUGH = 20


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "PAGE", 7)
    monkeypatch.setattr(closed, "PAGE", 7)


@pytest.fixture
async def pool(database_dsn: str) -> AsyncIterator[Pool]:
    async with database.opened(database_dsn) as pool:
        yield pool


async def write(events: EventStore, count: int) -> None:
    """Pictures of one character, one job each."""
    last = 0
    for nth in range(1, count + 1):
        event = ready(job_id(nth), content_hash=f"{nth:064}", character_id="c-1")
        [record] = await events.append([Draft(event, meta(f"command {nth}"), character("c-1"), last)])
        last = record.seq


async def copied(events: EventStore, connection: Connection) -> None:
    place, last = await archive.head(connection), (await guard.extent(events)).last
    async for page in logbook.written(events, place.seq + 1, last):
        place = await archive.add(connection, place, page)


async def taken_in(events: EventStore, pool: Pool) -> None:
    """Everybody has the whole log."""
    async with pool.acquire() as connection:
        await copied(events, connection)
        records = await everything(events)
        await fold(connection, records, [len(records)])
    await wait_until(lambda: announced(events), what="everything is announced")


async def announced(events: EventStore) -> bool:
    last = (await guard.extent(events)).last
    return await closing._announced(events, last) == last


async def everything(store: EventStore, start: int = 1, *filters: str) -> list[Recorded]:
    found: list[Recorded] = []
    async with aclosing(chronicle.records(store, start, filters or (topology.ALL_EVENTS,))) as batches:
        async for batch in batches:
            found += batch.records
            if batch.caught_up:
                break
    return found


async def looked(nc: Client, pool: Pool, through: int = THROUGH) -> closing.Closing:
    return await closing.look(nc, pool, MINE, Wanted(through), lambda done, of: None)


async def close(nc: Client, pool: Pool, through: int = THROUGH) -> EventStore:
    """The log after it was closed."""
    await closing.close(nc, pool, await looked(nc, pool, through))
    return EventStore(nc, before=await closed.find(nc, pool))


@pytest.fixture
async def before(events: EventStore, pool: Pool) -> list[Recorded]:
    """A log that can be closed."""
    await write(events, COUNT)
    await taken_in(events, pool)
    return await everything(events)


async def test_closed_events_are_told_as_before(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    store = await close(nats_client, pool)
    there = await guard.extent(events)
    assert (there.first, there.last, there.missing) == (THROUGH + 1, COUNT, 0)
    assert await everything(store) == before
    assert await everything(store, THROUGH) == before[THROUGH - 1 :]
    assert [await store.at(record.seq) for record in before] == before
    for nth in (3, THROUGH, THROUGH + 1, COUNT):
        mine = before[nth - 1]
        where = references(getattr(mine.event, "asset_id"))  # noqa: B009
        assert (await store.load(where)).events == [mine]
        assert await store.last(where) == mine
        assert await everything(store, 1, where) == [mine]
    assert (await store.load(character("c-1"))).events == before
    async with pool.acquire() as connection:
        await guard.check(store, connection)
        assert (await logbook.verify(store, connection)).events == COUNT


async def test_a_moment_before_the_closing_is_found(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    async with pool.acquire() as connection:
        rows = await connection.fetch("select seq, arrived from forge_log.entry order by seq")
    store = await close(nats_client, pool)
    for row in (rows[4], rows[THROUGH - 1], rows[THROUGH]):
        found = await store.since(row["arrived"])
        assert found is not None
        assert found.seq == row["seq"]
    assert await store.since(rows[-1]["arrived"] + timedelta(hours=1)) is None


async def test_a_decision_on_closed_events_is_written_once(
    nats_client: Client, events: EventStore, pool: Pool
) -> None:
    for nth in range(1, 5):
        user = f"u{nth}"
        await events.append([Draft(submitted(job_id(nth), user), meta(f"s{nth}"), admissions(user))])
        facts = job(user, job_id(nth))
        over = cancelled(job_id(nth), user, submitted_seq=2 * nth - 1)
        await events.append([Draft(over, meta(f"c{nth}"), facts)])
    await write_more(events)
    await taken_in(events, pool)
    store = await close(nats_client, pool, 8)
    facts = await store.load(job("u1", job_id(1)))
    assert facts.seq == 2
    draft = Draft(started(job_id(1), "u1", 1), meta("late"), facts.filter, facts.seq)
    [record] = await store.append([draft])
    assert (await store.load(facts.filter)).seq == record.seq
    other = Draft(started(job_id(1), "u1", 2), meta("later"), facts.filter, facts.seq)
    with pytest.raises(Conflict):
        await store.append([other])


async def test_what_is_new_needs_no_postgres(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await close(nats_client, pool)
    found = await closed.find(nats_client, pool)
    assert found is not None
    async with database.opened("postgresql://forge@127.0.0.1:9/forge") as nowhere:
        store = EventStore(nats_client, before=closed.Closed(nowhere, found.through, found.known))
        nobody = job("mei", new_id())
        assert (await store.load(nobody)).events == []
        assert await store.last(admissions("somebody-new")) is None
        assert await store.at(COUNT) is not None
        with pytest.raises(LogUnavailable, match="closed part of the log"):
            await store.load(references(getattr(before[2].event, "asset_id")))  # noqa: B009


async def test_it_can_be_closed_further(nats_client: Client, events: EventStore, pool: Pool) -> None:
    await write(events, COUNT)
    await taken_in(events, pool)
    before = await everything(events)
    await close(nats_client, pool, 5)
    store = await close(nats_client, pool, THROUGH)
    assert (await guard.extent(events)).first == THROUGH + 1
    assert await everything(store) == before
    with pytest.raises(ClosingRefused, match="begins at event 21"):
        await looked(nats_client, pool, 6)


async def test_a_closing_that_was_cut_is_whole_and_goes_on(
    nats_client: Client,
    events: EventStore,
    pool: Pool,
    before: list[Recorded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At each of its updates of the stream; a stream that was left shut is opened by `forge setup`."""
    plan, real = await looked(nats_client, pool), closing._update
    for cut in (1, 2, 3):
        left = cut

        async def cutting(nc: Client, config: dict[str, Any]) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise LogUnavailable("cut")
            await real(nc, config)

        monkeypatch.setattr(closing, "_update", cutting)
        with suppress(LogUnavailable):
            await closing.close(nats_client, pool, plan)
        monkeypatch.setattr(closing, "_update", real)
        store = EventStore(nats_client, before=await closed.find(nats_client, pool))
        async with pool.acquire() as connection:
            await guard.check(store, connection)
        assert await everything(store) == before
        await topology.apply(nats_client)
        plan = closing.Closing(1, THROUGH, COUNT)
    assert (await guard.extent(events)).first == THROUGH + 1
    config = msgspec.json.decode(await request(nats_client, f"STREAM.INFO.{EVENTS}"))["config"]
    assert (config["subjects"], config["discard"], config["max_msgs"]) == (["forge.evt.>"], "new", -1)


# ----------------------------------------------------------------- the refused


async def test_an_open_job_keeps_the_book_open(nats_client: Client, events: EventStore, pool: Pool) -> None:
    await write(events, 4)
    await events.append([Draft(submitted(job_id(99), "mei"), meta("open"), admissions("mei"))])
    await write_more(events)
    await taken_in(events, pool)
    with pytest.raises(ClosingRefused, match="which is pending, is at event 4"):
        await looked(nats_client, pool, 5)
    await looked(nats_client, pool, 4)


async def test_a_copy_that_is_behind_keeps_it_open(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await write_more(events)
    await write_more(events)
    with pytest.raises(ClosingRefused, match=f"second copy is at event {COUNT}"):
        await looked(nats_client, pool, COUNT + 1)


async def test_tables_that_are_behind_keep_it_open(
    nats_client: Client, events: EventStore, pool: Pool
) -> None:
    await write(events, COUNT)
    async with pool.acquire() as connection:
        await copied(events, connection)
    with pytest.raises(ClosingRefused, match="the checkpoint of queue is at event 0"):
        await looked(nats_client, pool)


async def test_a_file_that_waits_for_its_clean_up_keeps_it_open(
    nats_client: Client, events: EventStore, pool: Pool
) -> None:
    await write(events, 3)
    gone = expired(job_id(3), content_hash=f"{3:064}")
    await events.append([Draft(gone, meta("gone"), subject(gone))])
    await write_more(events)
    await taken_in(events, pool)
    with pytest.raises(ClosingRefused, match="the clean-up of files is at event 0"):
        await looked(nats_client, pool, 2)


async def test_what_is_not_announced_keeps_it_open(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await restoring._announce(nats_client, False)
    await write_more(events)
    await write_more(events)
    async with pool.acquire() as connection:
        await copied(events, connection)
        await fold(connection, (await everything(events))[COUNT:])
    with pytest.raises(ClosingRefused, match=f"announcing in FORGE_ASSETS_READY is at event {COUNT}"):
        await looked(nats_client, pool, COUNT + 1)
    await looked(nats_client, pool, COUNT)


async def test_it_is_closed_before_a_moment(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    async with pool.acquire() as connection:
        arrived = await connection.fetchval("select arrived from forge_log.entry where seq = 8")
    for moment, through in ((arrived, 7), (arrived + timedelta(hours=1), COUNT - 1)):
        plan = await closing.look(nats_client, pool, MINE, Wanted(before=moment), lambda done, of: None)
        assert (plan.first, plan.through, plan.last) == (1, through, COUNT)


async def test_nobody_closes_while_forge_runs(
    nats_client: Client, pool: Pool, before: list[Recorded]
) -> None:
    async with aclosing(follow(nats_client, 1)) as batches:
        await anext(batches)
        with pytest.raises(ClosingRefused, match="forge runs"):
            await looked(nats_client, pool)


async def test_a_copy_that_was_changed_keeps_it_open(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await changed(pool, "update forge_log.entry set data = '{}' where seq = 3")
    with pytest.raises((ArchiveDamaged, LogDamaged)):
        await looked(nats_client, pool)
    assert (await guard.extent(events)).first == 1


async def test_tables_of_another_log_keep_it_open(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await changed(
        pool, f"update projection_checkpoint set event_id = '{new_id()}' where projection = 'queue'"
    )
    with pytest.raises(LogDamaged, match="another log"):
        await looked(nats_client, pool)


async def test_what_closed_events_are_about_is_written_down(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await close(nats_client, pool)
    async with pool.acquire() as connection:
        known = await closed.known_through(connection, THROUGH)
        assert dict(await connection.fetch("select through, known from forge_log.closed")) == {
            THROUGH: known.bits
        }


async def test_a_copy_that_is_changed_afterwards_is_found(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    store = await close(nats_client, pool)
    await changed(pool, "update forge_log.entry set data = '{}' where seq = 3")
    async with pool.acquire() as connection:
        with pytest.raises(ArchiveDamaged, match="event 3"):
            await logbook.verify(store, connection)


async def test_a_closed_log_without_its_copy_is_refused(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await close(nats_client, pool)
    await changed(pool, "truncate forge_log.entry")
    async with pool.acquire() as connection:
        with pytest.raises(LogDamaged, match=f"closed through event {THROUGH}, and the second copy lacks it"):
            await guard.check(events, connection)
    await guard.check(events, None)


async def test_a_log_that_was_trimmed_further_is_refused(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    store = await close(nats_client, pool)
    config = msgspec.json.decode(await request(nats_client, f"STREAM.INFO.{EVENTS}"))["config"]
    assert MARK in config["metadata"]
    await request(nats_client, f"STREAM.UPDATE.{EVENTS}", config | {"discard": "old", "max_msgs": 9})
    async with pool.acquire() as connection:
        with pytest.raises(LogDamaged, match="begins at event 22"):
            await guard.check(store, connection)


async def test_what_was_written_meanwhile_stays(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    plan = await looked(nats_client, pool)
    await write_more(events)
    with pytest.raises(ClosingRefused, match="written meanwhile"):
        await closing.close(nats_client, pool, plan)
    assert (await guard.extent(events)).first == 1
    await write_more(events)


async def test_nothing_is_written_while_it_is_shut(
    nats_client: Client,
    events: EventStore,
    pool: Pool,
    before: list[Recorded],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan, real, refused = await looked(nats_client, pool), closing._update, 0

    async def writing(nc: Client, config: dict[str, Any]) -> None:
        nonlocal refused
        await real(nc, config)
        if refused < 2:  # shut, and trimmed
            with pytest.raises(NoRespondersError):
                await nc.request(admissions("mallory"), b"{}", timeout=30)
            refused += 1

    monkeypatch.setattr(closing, "_update", writing)
    await closing.close(nats_client, pool, plan)
    there = await guard.extent(events)
    assert (refused, there.first, there.last) == (2, THROUGH + 1, COUNT)
    await write_more(events)


# ------------------------------------------------------------------ the copies


async def test_a_closed_log_that_is_damaged_is_restored_from_its_first_event(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await close(nats_client, pool)
    with suppress(BrokerRefused):
        await request(nats_client, f"STREAM.DELETE.{EVENTS}")
    async with pool.acquire() as connection:
        done = await restoring.restore(nats_client, connection, MINE)
    assert done.events == COUNT
    assert await closed.find(nats_client, pool) is None
    assert [(r.seq, r.meta.id) for r in await everything(events)] == [(r.seq, r.meta.id) for r in before]


async def test_the_book_is_opened_again_by_word(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded]
) -> None:
    await close(nats_client, pool)
    async with pool.acquire() as connection:
        with pytest.raises(RestoreRefused, match=f"of which {THROUGH} are closed; --reopen"):
            await restoring.restore(nats_client, connection, MINE)
        done = await restoring.restore(nats_client, connection, MINE, reopen=True)
        assert (done.events, done.written, done.announced) == (COUNT, COUNT, True)
        there = await guard.extent(events)
        assert (there.first, there.closed.through) == (1, 0)
        await guard.check(events, connection)
        with pytest.raises(RestoreRefused, match="the log is whole: 30 events, of which the copy has 30"):
            await restoring.restore(nats_client, connection, MINE, reopen=True)
    found = [(r.seq, r.meta.id) for r in await everything(events)]
    assert found == [(r.seq, r.meta.id) for r in before]


async def test_the_copy_of_a_closed_log_is_taken_in_where_postgres_is_new(
    nats_client: Client, events: EventStore, pool: Pool, before: list[Recorded], tmp_path: Path
) -> None:
    store = await close(nats_client, pool)
    async with pool.acquire() as connection:
        await logbook.export(store, connection, tmp_path / "log", lambda done, of: None)
        with pytest.raises(FileUnfit, match="export the copy"):
            await logbook.export(store, None, tmp_path / "other")
    await changed(pool, "truncate forge_log.entry, forge_log.closed")
    async with pool.acquire() as connection:
        with suppress(RestoreRefused):  # the log is whole again as soon as the copy is
            await restoring.restore(nats_client, connection, MINE, tmp_path / "log")
        await guard.check(store, connection)
    store = EventStore(nats_client, before=await closed.find(nats_client, pool))
    assert await everything(store) == before
    assert (await store.load(references(getattr(before[2].event, "asset_id")))).events == [before[2]]  # noqa: B009


async def write_more(events: EventStore) -> None:
    """One more event, of something else."""
    event = ready(new_id(), content_hash=new_id().hex * 2)
    await events.append([Draft(event, meta(str(new_id())), subject(event))])


async def changed(pool: Pool, sql: str) -> None:
    """What only the owner of the copy can do, on purpose."""
    off = "alter table forge_log.{0} {1} trigger user"
    async with pool.acquire() as connection:
        for table in ("entry", "closed"):
            await connection.execute(off.format(table, "disable"))
        with suppress(asyncpg.UndefinedTableError):
            await connection.execute(sql)
        for table in ("entry", "closed"):
            await connection.execute(off.format(table, "enable"))
