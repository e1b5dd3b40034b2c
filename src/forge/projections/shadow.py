"""Tables made again beside the live ones, compared with them, and put in their place in one transaction.

They stand in a schema of their own, which the connection that fills them finds first: handlers and statements
are the ordinary ones. What they replace is kept in another schema until it is known to be needless.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import msgspec

from forge.database import Connection, Pool
from forge.errors import ReplayRefused
from forge.projections.projection import Projection, Table

SHADOW, BEFORE = "forge_shadow", "forge_before"

_ANALYSED_SECONDS = 3600.0
_INDEXING_MEMORY = "128MB"
_INDEXERS = 2
"""Connections that make indexes beside each other."""

_EXAMPLES = 3
_BUCKETS = 1024


class Position(msgspec.Struct, frozen=True):
    """How far a projection is, and which version of it made the rows."""

    version: int
    seq: int


class Shadow(msgspec.Struct, frozen=True):
    """Some projections' tables in ``SHADOW``, and the schema of those they are to replace."""

    live: str
    tables: tuple[Table, ...]

    @property
    def names(self) -> list[str]:
        return [table.name for table in self.tables]


class Difference(msgspec.Struct, frozen=True):
    """A table that is not what the log says; keys of some rows that are not in both."""

    table: str
    live_rows: int
    rebuilt_rows: int
    examples: tuple[str, ...]


# --------------------------------------------------------------------- making

_HOME = """
select quote_ident(n.nspname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.oid = $1::regclass
"""

_OPTIONS = "select array_to_string(reloptions, ', ') from pg_class where oid = $1::regclass"

_CONSTRAINTS = """
select format('alter table %I.%I add constraint %I %s',
              $2::text, $3::text, conname, pg_get_constraintdef(oid))
from pg_constraint where conrelid = $1::regclass and contype = any($4::"char"[]) order by conname
"""

# An index says where it stands; functions in it are found as they are by the live one.
_INDEXES = """
select replace(pg_get_indexdef(i.indexrelid), format(' ON %s.%s ', $2::text, $3::text),
               format(' ON %s.%s ', $4::text, $3::text))
from pg_index i
where i.indrelid = $1::regclass and not exists (select from pg_constraint c where c.conindid = i.indexrelid)
order by i.indexrelid
"""

_GRANTS = """
select format('grant %s on %I.%I to %s%s', a.privilege_type, $2::text, c.relname,
              case when a.grantee = 0 then 'public' else quote_ident(pg_get_userbyid(a.grantee)) end,
              case when a.is_grantable then ' with grant option' else '' end)
from pg_class c cross join lateral aclexplode(c.relacl) a
where c.oid = $1::regclass and a.grantee <> c.relowner
"""

_VIEWS = """
select distinct v.oid::regclass::text from pg_depend d
join pg_rewrite w on w.oid = d.objid and d.classid = 'pg_rewrite'::regclass
join pg_class v on v.oid = w.ev_class
where d.refobjid = any($1::text[]::regclass[]) and v.oid <> d.refobjid
"""


async def home(connection: Connection) -> str:
    """The schema of the tables in use.

    Raises:
        asyncpg.UndefinedTableError: there are none.
    """
    schema: str = await connection.fetchval(_HOME, "projection_checkpoint")
    return schema


async def make(connection: Connection, projections: Sequence[Projection]) -> Shadow:
    """Empty tables like those in use, without the indexes that only readers need. From now on this connection
    finds them first; whatever an earlier replay left is gone.

    Raises:
        ReplayRefused: somebody's view would go on showing the old rows.
    """
    await connection.execute(f"drop schema if exists {SHADOW} cascade")
    live = await home(connection)
    shadow = Shadow(live, tuple(table for projection in projections for table in projection.tables))
    views = await connection.fetch(_VIEWS, [f"{live}.{name}" for name in shadow.names])
    if views:
        raise ReplayRefused(
            f"{', '.join(row[0] for row in views)}: a view of tables that are to be replaced would go on "
            "showing the old ones. Drop it, replay, and make it again"
        )
    await connection.execute(f"create schema {SHADOW}")
    for name in ("projection_checkpoint", *shadow.names):
        await _like(connection, live, name)
    await connection.execute(
        "select set_config('search_path', $1 || ', ' || current_setting('search_path'), false)", SHADOW
    )
    return shadow


async def _like(connection: Connection, live: str, name: str) -> None:
    """Unlogged until it is filled: a crash of Postgres ends the replay, and the next one begins anew."""
    source = f"{live}.{name}"
    await connection.execute(
        f"create unlogged table {SHADOW}.{name} (like {source} including all excluding indexes)"
    )
    if options := await connection.fetchval(_OPTIONS, source):
        await connection.execute(f"alter table {SHADOW}.{name} set ({options})")
    statements = await connection.fetch(_CONSTRAINTS, source, SHADOW, name, [b"p"])
    statements += await connection.fetch(_GRANTS, source, SHADOW)
    for statement in statements:
        await connection.execute(statement[0])


async def finish(pool: Pool, shadow: Shadow, tell: Callable[[int, int], None]) -> None:
    """Make the filled tables safe from a crash, then the other indexes, and what the planner wants to know;
    ``tell`` hears how many of how many are done."""
    logged = [f"alter table {SHADOW}.{name} set logged" for name in shadow.names]
    indexes: list[str] = []
    others: list[str] = []  # which want a table for themselves
    async with pool.acquire() as connection:
        for name in shadow.names:
            source = f"{shadow.live}.{name}"
            indexes += [r[0] for r in await connection.fetch(_INDEXES, source, shadow.live, name, SHADOW)]
            others += [r[0] for r in await connection.fetch(_CONSTRAINTS, source, SHADOW, name, [b"u"])]
    others += [f"analyze {SHADOW}.{name}" for name in shadow.names]
    done, of = count(1), len(logged) + len(indexes) + len(others)
    for statements in (logged, indexes, others):
        waiting = iter(sorted(statements, key=lambda sql: "USING gin" not in sql))  # the slow ones first
        await _beside(*(_run_all(pool, waiting, lambda: tell(next(done), of)) for _ in range(_INDEXERS)))


async def _beside(*work: Coroutine[Any, Any, None]) -> None:
    """Do all of it; the first error ends the rest, and is raised as it is."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_all(pool: Pool, statements: Iterator[str], tell: Callable[[], None]) -> None:
    async with pool.acquire() as connection:
        await connection.execute(f"set maintenance_work_mem = '{_INDEXING_MEMORY}'")
        for statement in statements:
            await connection.execute(statement, timeout=_ANALYSED_SECONDS)
            tell()


async def drop(connection: Connection, schema: str) -> bool:
    """Let a schema of ours go; whether there was one."""
    there = await connection.fetchval("select to_regnamespace($1) is not null", schema)
    await connection.execute(f"drop schema if exists {schema} cascade")
    return bool(there)


# ------------------------------------------------------------------ comparing


async def positions(connection: Connection, schema: str) -> dict[str, Position]:
    """How far every projection is in this schema."""
    rows = await connection.fetch(f"select projection, version, seq from {schema}.projection_checkpoint")
    return {row["projection"]: Position(row["version"], row["seq"]) for row in rows}


# Sums of hashes, so that rows need no order; in buckets, so that those that differ are found again.
_SUMS = f"""
select hash & {_BUCKETS - 1} as bucket, count(*) as rows, sum(hash)::text as sum
from (select hashtextextended(t::text, 0) as hash from {{schema}}.{{table}} t) h group by 1
"""
_ROWS = f"""
select {{key}} as key, hashtextextended(t::text, 0) as hash from {{schema}}.{{table}} t
where hashtextextended(t::text, 0) & {_BUCKETS - 1} = any($1)
"""

Sums = dict[int, tuple[int, str]]


async def differences(
    live: Connection, rebuilt: Connection, shadow: Shadow, tables: Iterable[Table]
) -> list[Difference]:
    """Tables whose rows are not the same, byte for byte; each connection sees the moment to be compared."""
    found = []
    for table in tables:
        one = await _sums(live, shadow.live, table)
        other = await _sums(rebuilt, SHADOW, table)
        if differing := [
            bucket for bucket in one.keys() | other.keys() if one.get(bucket) != other.get(bucket)
        ]:
            some = sorted(differing)[: 2 * _EXAMPLES]
            rows = await _rows(live, shadow.live, table, some) ^ await _rows(rebuilt, SHADOW, table, some)
            examples = sorted({key for key, _ in rows})[:_EXAMPLES]
            found.append(Difference(table.name, _count(one), _count(other), tuple(examples)))
    return found


async def _sums(connection: Connection, schema: str, table: Table) -> Sums:
    sql = _SUMS.format(schema=schema, table=table.name)
    rows = await connection.fetch(sql, timeout=_ANALYSED_SECONDS)
    return {row["bucket"]: (row["rows"], row["sum"]) for row in rows}


async def _rows(
    connection: Connection, schema: str, table: Table, buckets: Sequence[int]
) -> set[tuple[str, int]]:
    key = " || ' ' || ".join(f't."{column}"::text' for column in table.key)
    sql = _ROWS.format(schema=schema, table=table.name, key=key)
    rows = await connection.fetch(sql, buckets, timeout=_ANALYSED_SECONDS)
    return {(row["key"], row["hash"]) for row in rows}


def _count(sums: Sums) -> int:
    return sum(rows for rows, _ in sums.values())


# ------------------------------------------------------------------- swapping

_TAKE_OVER = """
insert into {live}.projection_checkpoint as c (projection, version, seq, event_id)
select projection, version, seq, event_id from {shadow}.projection_checkpoint
on conflict (projection) do update
set version = excluded.version, seq = excluded.seq, event_id = excluded.event_id
"""


async def swap(
    connection: Connection,
    shadow: Shadow,
    catch_up: Callable[[Mapping[str, Position]], Awaitable[None]],
    *,
    patience_ms: int,
) -> None:
    """Put the rebuilt tables where the live ones are, and those into ``BEFORE``, in one transaction.

    The projector is held first, readers go on; ``catch_up`` then takes the rebuilt tables at least as far as
    the live ones are, and has committed it when it returns: a reader whose look began before the swap then
    finds nothing missing after it. Readers wait only for the exchange itself, and ``patience_ms`` for it.

    Raises:
        asyncpg.LockNotAvailableError: somebody holds a table for longer; nothing has changed.
    """
    live, checkpoint = shadow.live, f"{shadow.live}.projection_checkpoint"
    async with connection.transaction():
        await connection.execute(f"set local lock_timeout = {10 * patience_ms}")
        await connection.execute(f"drop schema if exists {BEFORE} cascade")
        await connection.execute(f"create schema {BEFORE}")
        # Projectors wait for this one and hold nothing meanwhile. Were their rows locked instead, they would
        # wait for those with the table in hand, which is wanted whole below.
        await connection.execute(f"lock table {checkpoint} in share row exclusive mode")
        await catch_up(await positions(connection, live))
        await connection.execute(f"set local lock_timeout = {patience_ms}")
        # The checkpoint first: a reader has it until its end, so none has half of its tables behind it.
        tables = ", ".join(f"{live}.{name}" for name in shadow.names)
        await connection.execute(f"lock table {checkpoint} in access exclusive mode")
        await connection.execute(f"lock table {tables} in access exclusive mode")
        await connection.execute(f"create table {BEFORE}.projection_checkpoint as table {checkpoint}")
        for name in shadow.names:
            await connection.execute(f"alter table {live}.{name} set schema {BEFORE}")
            await connection.execute(f"alter table {SHADOW}.{name} set schema {live}")
        await connection.execute(_TAKE_OVER.format(live=live, shadow=SHADOW))
        await connection.execute(f"drop schema {SHADOW} cascade")
