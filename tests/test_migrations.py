"""While a migration is applied, forge of the version before runs on the tables, and must find what it knows.

Held on a real database, by its catalogue before and after each file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from forge.database import migrate
from forge.topology import files

FILES = sorted((files() / "migrations").glob("*.sql"))

COLUMNS = """
select c.oid::regclass::text as place, a.attname as name, format_type(a.atttypid, a.atttypmod) as type,
    a.attnotnull and not a.atthasdef as demanded
from pg_class c join pg_namespace n on n.oid = c.relnamespace join pg_attribute a on a.attrelid = c.oid
where n.nspname in ('public', 'forge_log') and c.relkind in ('r', 'p', 'v')
    and a.attnum > 0 and not a.attisdropped
"""
RULES = """
with ours as (
    select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname in ('public', 'forge_log')
)
select conrelid::regclass::text as place, conname as name
from pg_constraint where conrelid in (select oid from ours) and contype <> 'n'
union
select indrelid::regclass::text, indexrelid::regclass::text
from pg_index where indrelid in (select oid from ours) and indisunique
"""


@dataclass(frozen=True)
class Shape:
    """What statements of a forge can depend on: (table, column) → (type, whether a row must bring it), and
    tables with the names of their constraints and unique indexes."""

    columns: dict[tuple[str, str], tuple[str, bool]]
    rules: set[tuple[str, str]]

    @property
    def tables(self) -> set[str]:
        return {place for place, _ in self.columns}


async def shape(dsn: str) -> Shape:
    connection = await asyncpg.connect(dsn)
    try:
        columns = {
            (r["place"], r["name"]): (r["type"], r["demanded"]) for r in await connection.fetch(COLUMNS)
        }
        return Shape(columns, {(r["place"], r["name"]) for r in await connection.fetch(RULES)})
    finally:
        await connection.close()


def broken(before: Shape, after: Shape) -> Iterator[str]:
    """What a forge that knows the shape before can no longer do."""
    for (table, name), (type_, demanded) in before.columns.items():
        now = after.columns.get((table, name))
        if now is None:
            yield f"{table}.{name} is gone"
        elif now[0] != type_:
            yield f"{table}.{name} was {type_} and is {now[0]}"
        elif now[1] and not demanded:
            yield f"{table}.{name} may no longer be left out"
    for (table, name), (_, demanded) in after.columns.items():
        if table in before.tables and (table, name) not in before.columns and demanded:
            yield f"{table}.{name} is new, and every row must bring it"
    for table, name in after.rules - before.rules:
        if table in before.tables:
            yield f"{name} is a new rule for rows of {table}"


@pytest.mark.parametrize("count", range(2, len(FILES) + 1), ids=lambda count: FILES[count - 1].stem)
async def test_the_version_before_goes_on_over_it(
    count: int, empty_database_dsn: str, tmp_path: Path
) -> None:
    for file in FILES[: count - 1]:
        shutil.copy(file, tmp_path)
    await migrate(empty_database_dsn, tmp_path)
    before = await shape(empty_database_dsn)
    shutil.copy(FILES[count - 1], tmp_path)
    await migrate(empty_database_dsn, tmp_path)
    assert [*broken(before, await shape(empty_database_dsn))] == []


PLANTED = {
    "alter table thing drop column name": "thing.name is gone",
    "alter table thing rename column name to title": "thing.name is gone",
    "alter table thing rename to things": "thing.id is gone",
    "alter table thing alter column name type varchar(9)": "thing.name was text and is character varying(9)",
    "alter table thing alter column name set not null": "thing.name may no longer be left out",
    "alter table thing add column must text not null": "thing.must is new, and every row must bring it",
    "alter table thing add check (length(name) < 9)": "thing_name_check is a new rule for rows of thing",
    "create unique index one on thing (name)": "one is a new rule for rows of thing",
    "alter table thing add column may text, add column has text not null default ''": "",
    "create table other (id int primary key, must text not null)": "",
    "create index quick on thing (name)": "",
}


@pytest.mark.parametrize(("sql", "wrong"), PLANTED.items())
async def test_what_would_stop_it_is_found(
    sql: str, wrong: str, empty_database_dsn: str, tmp_path: Path
) -> None:
    (tmp_path / "0001_thing.sql").write_text("create table thing (id int primary key, name text)")
    await migrate(empty_database_dsn, tmp_path)
    before = await shape(empty_database_dsn)
    (tmp_path / "0002_planted.sql").write_text(sql)
    await migrate(empty_database_dsn, tmp_path)
    found = [*broken(before, await shape(empty_database_dsn))]
    assert (wrong in found) if wrong else not found, found
