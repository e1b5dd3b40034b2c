"""A log and its second copy on real servers: compared, written into a file, and given back."""

from __future__ import annotations

import asyncio
import gzip
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client

import damage
from factories import job_id, meta, ready, submitted
from folding import ALL, fold, tables
from forge import archive, database, guard, logbook, logfile, restoring, topology
from forge.broker import connect, request
from forge.database import Connection
from forge.domain.chain import Entry
from forge.embedded import EmbeddedNats
from forge.errors import ArchiveDamaged, FileUnfit, LogDamaged, RestoreRefused
from forge.events.envelope import Recorded
from forge.eventstore import Draft, EventStore
from forge.follower import follow, follow_written
from waiting import wait_until

COUNT = 40


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "PAGE", 7)
    monkeypatch.setattr(logfile, "PAGE", 7)


@pytest.fixture
async def connection(database_dsn: str) -> AsyncIterator[Connection]:
    async with database.opened(database_dsn) as pool, pool.acquire() as connection:
        yield connection


async def write(events: EventStore, first: int, last: int) -> None:
    """Half of the events are submissions, half announce a picture."""
    for nth in range(first, last + 1):
        event = (
            ready(job_id(nth), content_hash=f"{nth:064}") if nth % 2 else submitted(job_id(nth), f"u{nth}")
        )
        await events.append([Draft(event, meta(f"command {nth}"), topology.subject(event))])


async def copied(events: EventStore, connection: Connection) -> None:
    place = await archive.head(connection)
    last = (await guard.extent(events)).last
    async for page in logbook.written(events, place.seq + 1, last):
        place = await archive.add(connection, place, page)


async def records(events: EventStore) -> list[Recorded]:
    found: list[Recorded] = []
    async with aclosing(follow(events.nc, 1)) as batches:
        async for batch in batches:
            found += batch.records
            if batch.caught_up:
                break
    return found


async def entries(events: EventStore) -> list[Entry]:
    """The log with the times when everything first arrived."""
    found: list[Entry] = []
    async with aclosing(follow_written(events.nc, 1)) as batches:
        async for batch in batches:
            found += batch.entries
            if batch.caught_up:
                break
    return found


async def announced(nc: Client) -> int:
    info = msgspec.json.decode(await request(nc, f"STREAM.INFO.{topology.ASSETS_READY}"))
    return int(info["state"]["messages"])


async def cleaned(nc: Client) -> int:
    info = msgspec.json.decode(await request(nc, "CONSUMER.INFO.FORGE_EVENTS.cleanup"))
    return int(info["delivered"]["stream_seq"])


@pytest.fixture
async def written(nats_client: Client, events: EventStore, connection: Connection) -> list[Entry]:
    """A log that is copied, projected and announced."""
    await write(events, 1, COUNT)
    await fold(connection, await records(events), [COUNT])
    await copied(events, connection)
    await wait_until(lambda: has_announced(nats_client, COUNT // 2))
    return await entries(events)


async def has_announced(nc: Client, count: int) -> bool:
    return await announced(nc) == count


def flipped(nth: int) -> Callable[[EmbeddedNats], None]:
    return lambda server: damage.flip(server, str(meta(f"command {nth}").id).encode())


async def restored(
    events: EventStore, connection: Connection, file: Path | None = None, **options: Any
) -> restoring.Restored:
    return await restoring.restore(events.nc, connection, ALL, file, **options)


# -------------------------------------------------------------------- verifying


async def test_a_log_and_its_copy_are_compared_to_the_end(
    events: EventStore, connection: Connection, written: list[Entry]
) -> None:
    await write(events, COUNT + 1, COUNT + 3)
    found = await logbook.verify(events, connection)
    assert (found.events, found.copied) == (COUNT + 3, COUNT)
    assert found.chain == (await archive.head(connection)).hash.hex()


async def test_the_first_difference_is_named(
    nats_server: EmbeddedNats, events: EventStore, connection: Connection, written: list[Entry]
) -> None:
    async with damage.after(nats_server, flipped(9)) as log:
        with pytest.raises(LogDamaged, match="event 10 comes right after event 8"):
            await logbook.verify(log, connection)
    await connection.execute("set session_replication_role = replica")
    await connection.execute("update forge_log.entry set data = '' where seq = 5")
    async with damage.after(nats_server) as log:
        with pytest.raises(ArchiveDamaged, match="at event 5:"):
            await logbook.verify(log, connection)


async def test_an_event_that_was_written_over_is_told_by_its_copy(
    nats_client: Client, events: EventStore, connection: Connection, written: list[Entry]
) -> None:
    """Sequence and id are those that are remembered."""
    await request(nats_client, "STREAM.DELETE.FORGE_EVENTS")
    await topology.apply(nats_client)
    for entry in written:
        data = entry.data.replace(b"a crane", b"a crate") if entry.seq == 22 else entry.data
        await nats_client.request(entry.subject, data, 30, headers=entry.headers)
    await guard.check(events, connection)
    with pytest.raises(LogDamaged, match="the data of event 22 is not what the second copy has"):
        await logbook.verify(events, connection)


# --------------------------------------------------------------------- the file


async def test_a_file_holds_the_log_and_is_checked_alone(
    events: EventStore, connection: Connection, written: list[Entry], tmp_path: Path
) -> None:
    one, other = tmp_path / "copy.gz", tmp_path / "log.gz"
    end = await logbook.export(events, connection, one)
    assert end == await logbook.export(events, None, other) == await archive.head(connection)
    assert logfile.check(one)[0] == end
    assert [entry for page in logfile.read(other) for entry in page] == written
    with pytest.raises(FileUnfit, match="is there already"):
        await logbook.export(events, connection, one)


async def test_a_file_has_what_the_copy_does_not_have_yet(
    events: EventStore, connection: Connection, written: list[Entry], tmp_path: Path
) -> None:
    await write(events, COUNT + 1, COUNT + 3)
    behind = await logbook.export(events, connection, tmp_path / "behind.gz")
    assert behind == await logbook.export(events, None, tmp_path / "log.gz")
    assert behind.seq == COUNT + 3
    await connection.execute("drop schema forge_log cascade")
    assert await logbook.export(events, connection, tmp_path / "none.gz") == behind


async def test_of_a_damaged_log_a_file_has_the_copy(
    nats_client: Client, events: EventStore, connection: Connection, written: list[Entry], tmp_path: Path
) -> None:
    whole = await archive.head(connection)
    await request(nats_client, f"STREAM.DELETE.{topology.EVENTS}")
    assert await logbook.export(events, connection, tmp_path / "copy.gz") == whole


async def test_a_file_that_was_harmed_is_refused(
    events: EventStore, connection: Connection, written: list[Entry], tmp_path: Path
) -> None:
    file = tmp_path / "copy.gz"
    await logbook.export(events, connection, file)
    whole = file.read_bytes()
    lines = gzip.decompress(whole).splitlines(keepends=True)
    harmed = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
        "no file of ours": b"hello",
        "another kind": gzip.compress(b"{}\n"),
        "a line less": gzip.compress(b"".join(lines[:9] + lines[10:])),
        "lines turned": gzip.compress(b"".join([*lines[:9], lines[10], lines[9], *lines[11:]])),
        "a word changed": gzip.compress(b"".join(lines).replace(b"u22", b"u23", 1)),
        "no end": gzip.compress(b"".join(lines[:-1])),
        "more behind its end": gzip.compress(b"".join([*lines, lines[-1]])),
    }
    for what, kept in harmed.items():
        file.write_bytes(kept)
        with pytest.raises(FileUnfit):
            pytest.fail(f"{what}: {logfile.check(file)}")


async def test_of_two_exports_into_one_file_the_second_is_refused(
    events: EventStore, connection: Connection, written: list[Entry], tmp_path: Path
) -> None:
    file, begun, go = tmp_path / "log.gz", asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[list[Entry]]:
        begun.set()
        await go.wait()
        yield written

    first = asyncio.create_task(logfile.write(file, slow(), len(written), lambda *_: None))
    await begun.wait()
    with pytest.raises(FileUnfit, match="another export is writing"):
        await logbook.export(events, connection, file)
    go.set()
    assert await first == logfile.check(file)[0]
    assert os.listdir(tmp_path) == [file.name]


async def test_an_export_goes_on_where_one_was_killed(
    events: EventStore, connection: Connection, written: list[Entry], tmp_path: Path
) -> None:
    file = tmp_path / "log.gz"
    (tmp_path / "log.gz.part").write_bytes(b"the beginning of another day" * 10_000)
    assert await logbook.export(events, connection, file) == logfile.check(file)[0]


# -------------------------------------------------------------------- restoring


HARM = {
    "cut": damage.cut,
    "lost": damage.lose,
    "flipped": flipped(9),
    "gone": lambda server: __import__("shutil").rmtree(damage.blocks(server)[0].parents[1]),
}


@pytest.mark.fault("D7")
@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
async def test_a_damaged_log_is_given_back(
    nats_server: EmbeddedNats,
    connection: Connection,
    database_dsn: str,
    written: list[Entry],
    harm: Callable[[EmbeddedNats], None],
) -> None:
    """The same events, clean-ups go on where they were, nothing is announced twice, tables are the same."""
    nc = await connect(nats_server.url, "cleanup")
    if harm is not HARM["gone"]:
        await request(nc, "CONSUMER.RESET.FORGE_EVENTS.cleanup", {"seq": 13})
    await nc.close()
    async with damage.after(nats_server, harm) as log:
        with pytest.raises(LogDamaged):
            await logbook.verify(log, connection)
        if harm is not HARM["flipped"]:  # behind every landmark, and the server does not say so
            with pytest.raises(LogDamaged):
                await guard.at_start(log, database_dsn)
        done = await restored(log, connection)
        assert (done.events, done.written, done.lost, done.announced) == (COUNT, COUNT, 0, True)
        assert await entries(log) == written
        await guard.at_start(log, database_dsn)
        await logbook.verify(log, connection)
        assert {change.outcome for change in await topology.apply(log.nc)} == {"unchanged"}
        assert await cleaned(log.nc) == (COUNT if harm is HARM["gone"] else 12)
        before = await tables(connection)
        await connection.execute(f"truncate {', '.join(before)}")
        await fold(connection, await records(log), [7])
        assert await tables(connection) == before
        await write(log, COUNT + 1, COUNT + 2)
        await wait_until(lambda: has_announced(log.nc, COUNT // 2 + 1))
        with pytest.raises(RestoreRefused, match="the log is whole"):
            await restored(log, connection)


async def test_the_past_is_found_by_when_it_was(
    nats_server: EmbeddedNats, events: EventStore, connection: Connection, written: list[Entry]
) -> None:
    moments = [written[0].arrived, written[17].arrived, datetime.now().astimezone()]
    before = [await events.since(moment) for moment in moments]
    assert [record and record.seq for record in before] == [1, 18, None]
    async with damage.after(nats_server, flipped(9)) as log:
        await restored(log, connection)
        assert [await log.since(moment) for moment in moments] == before


async def test_a_restore_that_is_cut_is_run_again(
    nats_server: EmbeddedNats,
    connection: Connection,
    database_dsn: str,
    written: list[Entry],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with damage.after(nats_server, flipped(9)) as log:
        steps: list[int] = []

        def cut(step: restoring.Step) -> None:
            if step.what == "writing":
                steps.append(step.done)
            if len(steps) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            await restored(log, connection, progress=cut)
        with pytest.raises(LogDamaged, match="being restored, as far as event 14 by now"):
            await guard.at_start(log, database_dsn)
        done = await restored(log, connection)
        assert (done.events, done.written) == (COUNT, COUNT - 14)
        assert await entries(log) == written


async def test_what_the_copy_does_not_have_yet_is_saved(
    nats_server: EmbeddedNats, events: EventStore, connection: Connection, written: list[Entry]
) -> None:
    await write(events, COUNT + 1, COUNT + 9)
    whole = await entries(events)
    async with damage.after(nats_server, flipped(9)) as log:
        done = await restored(log, connection)
        assert (done.events, done.saved) == (COUNT + 9, 9)
        assert await entries(log) == whole


async def test_what_was_cut_off_before_it_was_copied_is_lost_only_by_word(
    nats_server: EmbeddedNats, events: EventStore, connection: Connection, written: list[Entry]
) -> None:
    """The server counts what it no longer has, and nothing of it is due."""
    await write(events, COUNT + 1, COUNT + 2)
    async with damage.after(nats_server, damage.cut) as log:
        with pytest.raises(RestoreRefused, match=f"2 events behind event {COUNT} .* --shorter"):
            await restored(log, connection)
        done = await restored(log, connection, shorter=True)
        assert (done.events, done.saved, done.lost) == (COUNT, 0, 2)
        assert await entries(log) == written


async def test_nothing_is_given_up_unasked(
    nats_server: EmbeddedNats,
    events: EventStore,
    connection: Connection,
    database_dsn: str,
    written: list[Entry],
) -> None:
    await write(events, COUNT + 1, COUNT + 9)
    await fold(connection, (await records(events))[COUNT:], [9])
    async with damage.after(nats_server, flipped(COUNT + 5)) as log:
        with pytest.raises(RestoreRefused, match=f"5 events behind event {COUNT + 4} .* --shorter"):
            await restored(log, connection)
        done = await restored(log, connection, shorter=True)
        assert (done.events, done.saved, done.lost) == (COUNT + 4, 0, 5), "saved at the first try"
        await guard.at_start(log, database_dsn)
        await fold(connection, await records(log), [COUNT + 4])
        assert await connection.fetchval("select count(*) from generation_queue") == (COUNT + 4) // 2


async def test_a_new_server_and_a_new_postgres_are_filled_from_a_file(
    nats_server: EmbeddedNats,
    nats_client: Client,
    events: EventStore,
    connection: Connection,
    database_dsn: str,
    tmp_path: Path,
) -> None:
    file, elsewhere = tmp_path / "log.gz", await connect(nats_server.url, "elsewhere")
    await write(events, 1, COUNT)
    whole = await entries(events)
    await logbook.export(events, None, file)
    for name in ("FORGE_EVENTS", topology.ASSETS_READY):
        await request(nats_client, f"STREAM.DELETE.{name}")
    with pytest.raises(RestoreRefused, match="no second copy; give a file"):
        await restored(events, connection)
    done = await restored(events, connection, file)
    assert (done.events, done.announced) == (COUNT, False)
    assert await entries(events) == whole
    await guard.at_start(events, database_dsn)
    await wait_until(lambda: has_announced(nats_client, COUNT // 2))
    await elsewhere.close()


async def test_a_file_of_another_log_or_of_less_is_refused(
    events: EventStore, connection: Connection, written: list[Entry], tmp_path: Path
) -> None:
    other, less = tmp_path / "other.gz", tmp_path / "less.gz"

    async def pages(first: Entry, count: int) -> AsyncIterator[list[Entry]]:
        yield [first, *written[1:count]]

    await logfile.write(less, pages(written[0], 30), 30, lambda *_: None)
    await logfile.write(
        other, pages(msgspec.structs.replace(written[0], data=b"{}"), COUNT), COUNT, lambda *_: None
    )
    with pytest.raises(RestoreRefused, match=f"the second copy has {COUNT} events and .* 30"):
        await restored(events, connection, less)
    with pytest.raises(RestoreRefused, match="of another log"):
        await restored(events, connection, other)


async def test_another_log_is_not_written_over(
    nats_client: Client, events: EventStore, connection: Connection, written: list[Entry]
) -> None:
    await request(nats_client, "STREAM.DELETE.FORGE_EVENTS")
    await topology.apply(nats_client)
    await write(events, 100, 102)
    with pytest.raises(RestoreRefused, match="the log there is another one"):
        await restored(events, connection)
    assert await events.head() == 3


async def test_nothing_is_restored_while_forge_runs(
    nats_server: EmbeddedNats, connection: Connection, written: list[Entry]
) -> None:
    async with damage.after(nats_server, flipped(9)) as log, aclosing(follow(log.nc, 20)) as batches:
        await anext(batches)
        with pytest.raises(RestoreRefused, match="forge runs: follow-"):
            await restored(log, connection)


async def test_a_copy_that_does_not_hold_restores_nothing(
    nats_server: EmbeddedNats, connection: Connection, written: list[Entry]
) -> None:
    await connection.execute("set session_replication_role = replica")
    await connection.execute("update forge_log.entry set data = '' where seq = 30")
    async with damage.after(nats_server, damage.cut) as log:
        with pytest.raises(ArchiveDamaged, match="at event 30:"):
            await restored(log, connection)
        assert (await guard.extent(log)).missing
