"""Migrations: in order, each once, whole or not at all; and Postgres being away has one name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from forge.database import answering, migrate, migrations, opened
from forge.embedded import EmbeddedPostgres
from forge.errors import DatabaseUnavailable, MigrationFailed
from waiting import wait_until

ADD_NAMES = "alter table thing add column name text; insert into thing values (1, 'a')"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two migrations."""
    write(tmp_path, "0001_things.sql", "create table thing (id int primary key);")
    write(
        tmp_path,
        "0002_names.sql",
        "alter table thing add column name text; insert into thing values (1, 'a')",
    )
    return tmp_path


def write(folder: Path, name: str, sql: str) -> None:
    (folder / name).write_text(sql)


async def rows(dsn: str, sql: str) -> list[tuple[Any, ...]]:
    connection = await asyncpg.connect(dsn)
    try:
        return [tuple(row) for row in await connection.fetch(sql)]
    finally:
        await connection.close()


APPLIED = "select number, name from forge_migration order by number"


# ---------------------------------------------------------------- the files


def test_forges_own_files_are_in_order() -> None:
    assert [m.number for m in migrations()] == list(range(1, len(migrations()) + 1))


@pytest.mark.parametrize("name", ["1_things.sql", "0003-things.sql", "things.sql", "0003_Things.sql"])
def test_a_file_that_is_named_wrongly_is_refused_by_its_name(folder: Path, name: str) -> None:
    write(folder, name, "")
    with pytest.raises(MigrationFailed, match=name):
        migrations(folder)


@pytest.mark.parametrize("name", ["0004_later.sql", "0002_twice.sql", "0000_before.sql"])
def test_a_gap_or_a_double_in_the_numbers_is_refused(folder: Path, name: str) -> None:
    write(folder, name, "")
    with pytest.raises(MigrationFailed, match="without gaps"):
        migrations(folder)


# ---------------------------------------------------------------- applying


async def test_an_empty_database_gets_all_in_order(folder: Path, empty_database_dsn: str) -> None:
    assert await migrate(empty_database_dsn, folder) == ["0001_things.sql", "0002_names.sql"]
    assert await rows(empty_database_dsn, "select * from thing") == [(1, "a")]
    assert await rows(empty_database_dsn, APPLIED) == [(1, "0001_things.sql"), (2, "0002_names.sql")]


async def test_each_is_applied_once(folder: Path, empty_database_dsn: str) -> None:
    await migrate(empty_database_dsn, folder)
    assert await migrate(empty_database_dsn, folder) == []
    write(folder, "0003_more.sql", "insert into thing values (2, 'b')")
    assert await migrate(empty_database_dsn, folder) == ["0003_more.sql"]
    assert await rows(empty_database_dsn, "select id from thing order by id") == [(1,), (2,)]


async def test_forges_own_files_can_be_applied_again(database_dsn: str) -> None:
    assert await migrate(database_dsn) == []


async def test_a_file_that_was_changed_is_refused_by_its_name(folder: Path, empty_database_dsn: str) -> None:
    await migrate(empty_database_dsn, folder)
    write(folder, "0001_things.sql", "create table thing (id bigint primary key);")
    write(folder, "0003_more.sql", "insert into thing values (2, 'b')")
    with pytest.raises(MigrationFailed, match=r"0001_things.sql was changed after it was applied"):
        await migrate(empty_database_dsn, folder)
    assert len(await rows(empty_database_dsn, APPLIED)) == 2


@pytest.mark.fault("C1")
async def test_a_database_that_is_newer_is_left_alone(folder: Path, empty_database_dsn: str) -> None:
    await migrate(empty_database_dsn, folder)
    (folder / "0002_names.sql").unlink()
    with pytest.raises(MigrationFailed, match="the database is at migration 2, this forge knows 1"):
        await migrate(empty_database_dsn, folder)


async def test_of_a_file_that_fails_nothing_stays(folder: Path, empty_database_dsn: str) -> None:
    write(folder, "0003_wrong.sql", "insert into thing values (2, 'b'); select nonsense;")
    write(folder, "0004_never.sql", "insert into thing values (3, 'c')")
    with pytest.raises(MigrationFailed, match=r"0003_wrong.sql: .*nonsense"):
        await migrate(empty_database_dsn, folder)
    assert await rows(empty_database_dsn, "select id from thing") == [(1,)]
    assert len(await rows(empty_database_dsn, APPLIED)) == 2
    write(folder, "0003_wrong.sql", "insert into thing values (2, 'b')")
    assert await migrate(empty_database_dsn, folder) == ["0003_wrong.sql", "0004_never.sql"]


async def test_of_many_at_once_each_file_is_applied_by_one(folder: Path, empty_database_dsn: str) -> None:
    write(folder, "0003_slow.sql", "select pg_sleep(0.2); insert into thing values (2, 'b')")
    done = await asyncio.gather(*(migrate(empty_database_dsn, folder) for _ in range(6)))
    assert sorted(name for names in done for name in names) == [m.name for m in migrations(folder)]
    assert await rows(empty_database_dsn, "select id from thing order by id") == [(1,), (2,)]


async def test_a_run_that_was_killed_is_taken_up(folder: Path, empty_database_dsn: str) -> None:
    write(folder, "0003_long.sql", "insert into thing values (2, 'b'); select pg_sleep(60)")
    running = asyncio.create_task(migrate(empty_database_dsn, folder))
    sleeping = (
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and wait_event = 'PgSleep'"
    )
    await wait_until(lambda: rows(empty_database_dsn, sleeping), what="the migration was cut off")
    with pytest.raises(DatabaseUnavailable):  # not the fault of the file: try again
        await running
    write(folder, "0003_long.sql", "insert into thing values (2, 'b')")
    assert await migrate(empty_database_dsn, folder) == ["0003_long.sql"]


# ---------------------------------------------------------------------- away


async def test_a_database_that_is_away_has_one_name(open_directory: Path) -> None:
    nowhere = f"postgresql://postgres@/forge?host={open_directory}/nowhere"
    with pytest.raises(DatabaseUnavailable):
        await migrate(nowhere)
    async with opened(nowhere) as pool:  # opening waits for nobody
        with pytest.raises(DatabaseUnavailable):
            async with answering():
                await pool.fetchval("select 1")


async def test_a_pool_outlives_its_server(open_directory: Path) -> None:
    server = EmbeddedPostgres(open_directory / "restarted", throwaway=True)
    server.start()
    try:
        async with opened(server.dsn()) as pool:
            assert await pool.fetchval("select 1") == 1
            server.stop()
            with pytest.raises(DatabaseUnavailable):
                async with answering():
                    await pool.fetchval("select 1")
            server.start()
            assert await pool.fetchval("select 1") == 1
    finally:
        server.stop()


@pytest.mark.parametrize(
    "statement",
    [
        "select pg_terminate_backend(pg_backend_pid())",
        "do $$ begin raise exception using errcode = '53100'; end $$",  # the disk is full
        "do $$ begin raise exception using errcode = '53200'; end $$",  # out of memory
        "do $$ begin raise exception using errcode = '57P03'; end $$",  # still starting
        "do $$ begin raise exception using errcode = '40P01'; end $$",  # deadlock
    ],
)
async def test_what_trying_again_can_heal_has_that_name(database_dsn: str, statement: str) -> None:
    async with opened(database_dsn) as pool:
        with pytest.raises(DatabaseUnavailable):
            async with answering():
                await pool.execute(statement)


async def test_a_connection_that_lost_its_place_is_no_answer() -> None:
    """Seen when connections were reset while Postgres was killed: requests ended with 500."""
    with pytest.raises(DatabaseUnavailable):
        async with answering():
            raise asyncpg.InternalClientError("cannot switch to state 15; another operation is in progress")


async def test_a_slow_answer_is_no_answer(database_dsn: str) -> None:
    async with opened(database_dsn, command_timeout=0.1) as pool:
        with pytest.raises(DatabaseUnavailable):
            async with answering():
                await pool.execute("select pg_sleep(5)")


async def test_a_wrong_statement_is_nobodys_absence(database_dsn: str) -> None:
    async with opened(database_dsn) as pool:
        with pytest.raises(asyncpg.UndefinedColumnError):
            async with answering():
                await pool.execute("select nonsense")


async def test_json_goes_in_and_out_as_python_has_it(database_dsn: str) -> None:
    value = {"seed": 2**53 + 1, "cfg": 1.5, "words": ["é", "雪", None, True], "deep": {"a": {}}}
    async with opened(database_dsn) as pool:
        for kind in ("json", "jsonb"):
            assert await pool.fetchval(f"select $1::{kind}", value) == value
