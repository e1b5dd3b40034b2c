"""Postgres: the pool, and migrations from plain files.

Postgres holds only what the log can rebuild, so a commit does not wait for the disk: what a crash takes, rows
and checkpoint together, is simply taken in again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg
import msgspec

from forge.errors import DatabaseUnavailable, MigrationFailed, TablesMissing
from forge.topology import files

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection, Pool = asyncpg.Connection, asyncpg.Pool

log = logging.getLogger("forge.database")

T = TypeVar("T")

_DOWN = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that broke in the middle of an exchange, and is used again
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InsufficientResourcesError,  # connections, memory, disk
    asyncpg.TransactionRollbackError,  # lost against another transaction
    asyncpg.InternalServerError,  # "could not open relation": somebody drops the table in that moment
)

_EMPTIED = (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError)

_LOCK = 0x666F726765  # "forge": one migration run at a time
_NAME = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")

_RECORDS = """
create table if not exists forge_migration (
    number integer primary key,
    name text not null,
    checksum text not null,
    applied_at timestamptz not null default now()
)
"""


class Migration(msgspec.Struct, frozen=True):
    """One numbered file."""

    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


@contextmanager
def _readable() -> Iterator[None]:
    """Where an answer is garbled, asyncpg says so by whatever error its decoders run into, which would pass
    for a mistake of forge's, or of the client's.

    Raises:
        asyncpg.InternalClientError: it is; the connection is of no more use.
    """
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError):
        raise
    except Exception as error:
        log.warning("an answer of Postgres cannot be read", extra={"reason": repr(error)})
        raise asyncpg.InternalClientError(f"its answer cannot be read: {error!r}") from error


class _Heard(asyncpg.Connection):
    """A connection that is broken when its answers are garbled."""

    async def execute(self, *args: Any, **more: Any) -> str:
        return await self._heard(super().execute(*args, **more))

    async def _do_execute(self, *args: Any, **more: Any) -> Any:
        return await self._heard(super()._do_execute(*args, **more))  # type: ignore[misc]  # its types lack it

    async def _heard(self, answer: Awaitable[T]) -> T:
        try:
            with _readable():
                return await answer
        except asyncpg.InternalClientError:
            self.terminate()
            raise


async def connect(*args: Any, **more: Any) -> Any:
    """asyncpg's own, with one error more that says that Postgres does not answer.

    Raises:
        asyncpg.InternalClientError: what it answers is garbled.
    """
    with _readable():
        return await asyncpg.connect(*args, **more)


@asynccontextmanager
async def opened(dsn: str, *, most: int = 8, command_timeout: float = 10.0) -> AsyncIterator[Pool]:
    """A pool that connects when first used, so that forge starts while Postgres is away."""
    pool = asyncpg.create_pool(
        dsn,
        connect=connect,
        connection_class=_Heard,
        min_size=0,
        max_size=most,
        command_timeout=command_timeout,
        timeout=3.0,
        init=_prepare,
        max_inactive_connection_lifetime=60.0,
        server_settings={"synchronous_commit": "off"},
    )
    await pool
    try:
        yield pool
    finally:
        try:
            await asyncio.wait_for(pool.close(), 3.0)
        except TimeoutError:
            pool.terminate()


@asynccontextmanager
async def answering() -> AsyncIterator[None]:
    """Turn every way in which Postgres can be away into one error.

    Raises:
        DatabaseUnavailable: it is starting, stopping, unreachable, too slow, or short of something.
        TablesMissing: it answers, and has not forge's tables.
    """
    try:
        yield
    except _EMPTIED as error:
        raise TablesMissing(f"the tables are not there, and are made again from the log: {error}") from error
    except _DOWN as error:
        raise DatabaseUnavailable(f"Postgres does not answer: {error!r}") from error


@asynccontextmanager
async def held(pool: Pool) -> AsyncIterator[Connection]:
    """A connection to hold on to. Its loss is told at once, even when nothing happens in the log: a server
    that crashed may have lost the last commits, and they are to be taken in again.

    Raises:
        DatabaseUnavailable: there is none, or it is gone.
    """
    now = asyncio.get_running_loop().time
    async with answering(), asyncio.timeout(None) as bound, pool.acquire() as connection:

        def lost(_: object) -> None:
            bound.reschedule(now())

        connection.add_termination_listener(lost)
        try:
            yield connection
        finally:
            connection.remove_termination_listener(lost)


async def _prepare(connection: Any) -> None:
    for kind in ("json", "jsonb"):
        await connection.set_type_codec(
            kind,
            schema="pg_catalog",
            encoder=lambda value: msgspec.json.encode(value).decode(),
            decoder=msgspec.json.decode,
        )


# ---------------------------------------------------------------- migrations


def migrations(folder: Path | None = None) -> list[Migration]:
    """The numbered files in order.

    Raises:
        MigrationFailed: a name that is not ``0001_what.sql``, or a gap in the numbers.
    """
    found = []
    for path in sorted((folder or files() / "migrations").glob("*.sql")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise MigrationFailed(f"{path.name}: a migration is named like 0001_what_it_does.sql")
        found.append(Migration(int(match[1]), path.name, path.read_text()))
    if [m.number for m in found] != list(range(1, len(found) + 1)):
        raise MigrationFailed(f"the numbers of {folder or 'migrations'} are not 1, 2, 3, … without gaps")
    return found


async def applied(connection: Connection) -> dict[int, str]:
    """Number and checksum of the migrations a database has; nothing is changed."""
    if not await connection.fetchval("select to_regclass('forge_migration') is not null"):
        return {}
    return {r["number"]: r["checksum"] for r in await connection.fetch("select * from forge_migration")}


async def trigrams(connection: Connection) -> bool:
    """Whether the database has what searches for words go by."""
    there: bool = await connection.fetchval(
        "select exists (select from pg_extension where extname = 'pg_trgm')"
    )
    return there


async def migrate(dsn: str, folder: Path | None = None) -> list[str]:
    """Bring the database to this version; may be repeated and run from several processes at once.

    Returns the names of the files that were applied now.

    Raises:
        MigrationFailed: the database is newer than the code, a file was changed after it was applied, or its
            SQL failed; nothing of a failed file stays.
        DatabaseUnavailable: no answer.
    """
    wanted = migrations(folder)
    async with answering():
        connection = await connect(dsn, timeout=5.0)
        try:
            return await _migrated(connection, wanted)
        finally:
            await connection.close()


async def check_not_newer(dsn: str, folder: Path | None = None) -> None:
    """See that no newer forge has been here; nothing is changed.

    Raises:
        MigrationFailed: one has.
        DatabaseUnavailable: no answer.
    """
    wanted = migrations(folder)
    async with answering():
        connection = await connect(dsn, timeout=5.0)
        try:
            _refuse_newer(len(await applied(connection)), wanted)
        finally:
            await connection.close()


async def remake(pool: Pool) -> list[str]:
    """:func:`migrate` for a running forge whose database somebody emptied: nobody sees the tables as an early
    migration leaves them."""
    async with answering(), pool.acquire() as connection:
        try:
            async with connection.transaction():
                return await _migrated(connection, migrations())
        finally:
            connection.remove_log_listener(_pass_on)


async def _migrated(connection: Connection, wanted: list[Migration]) -> list[str]:
    connection.add_log_listener(_pass_on)
    await _locked(connection)
    if await connection.fetchval("select current_schema()") is None:
        await connection.execute("create schema if not exists public")
    await connection.execute(_RECORDS)
    applied = {r["number"]: r for r in await connection.fetch("select * from forge_migration")}
    _refuse_newer(len(applied), wanted)
    return [m.name for m in wanted if await _applied(connection, m, applied.get(m.number))]


def _refuse_newer(count: int, wanted: list[Migration]) -> None:
    if count > len(wanted):
        raise MigrationFailed(
            f"the database is at migration {count}, this forge knows {len(wanted)}: upgrade forge"
        )


def _pass_on(_: object, message: Any) -> None:
    """What a migration warns of, for whoever looks after forge."""
    if message.severity == "WARNING":
        log.warning("a migration warns", extra={"reason": message.message})


async def _locked(connection: Connection, patience: float = 60.0) -> None:
    # polled: a blocking advisory lock deadlocks with `create index concurrently` of whoever holds it
    deadline = time.monotonic() + patience
    while not await connection.fetchval("select pg_try_advisory_lock($1)", _LOCK):
        if time.monotonic() > deadline:
            raise MigrationFailed(f"another process has been migrating for {patience:.0f} s")
        await asyncio.sleep(0.05)


async def _applied(connection: Connection, migration: Migration, before: asyncpg.Record | None) -> bool:
    if before is not None:
        if before["checksum"] != migration.checksum:
            raise MigrationFailed(
                f"{migration.name} was changed after it was applied: add a new file instead"
            )
        return False
    try:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(
                "insert into forge_migration (number, name, checksum) values ($1, $2, $3)",
                migration.number,
                migration.name,
                migration.checksum,
            )
    except _DOWN:
        raise
    except asyncpg.PostgresError as error:
        raise MigrationFailed(f"{migration.name}: {error}") from error
    return True
