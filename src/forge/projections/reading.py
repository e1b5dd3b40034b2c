"""Reading the tables: one short, bounded, consistent look at them.

Everything a request reads is read in one read-only transaction, together with the sequence the tables stand
at, and takes less than a second or fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import msgspec

from forge.database import Connection, Pool, answering
from forge.errors import DatabaseUnavailable

SECONDS = 0.9
"""How long a request waits for a connection, and then for its answers."""

ONCE, EACH_TIME = "auto", "force_custom_plan"
"""How statements are planned. What has optional filters, or words, is planned for the values at hand, so that
each becomes the index it can use; for what always goes the same way that would cost as much as the rows."""

# in one exchange
_BEGIN = """
begin isolation level repeatable read, read only;
set local statement_timeout = {:.0f};
set local plan_cache_mode = {}
"""

# usage follows another stream, whose sequences have nothing to do with these
_POSITION = """
select case when count(*) = 4 then min(seq) else 0 end
from projection_checkpoint where projection in ('queue', 'inventory', 'stats', 'uploads')
"""


class Tables(msgspec.Struct, frozen=True):
    """The tables at one moment; ``seq`` is the last event of the log they tell of."""

    connection: Connection
    seq: int


@asynccontextmanager
async def looking(pool: Pool, *, plans: str = EACH_TIME) -> AsyncIterator[Tables]:
    """Look at the tables.

    Raises:
        DatabaseUnavailable: Postgres is away, frozen, or took too long.
    """
    try:
        async with answering(), pool.acquire(timeout=SECONDS) as connection:
            # A frozen server answers no cancellation either; ending the connection always works.
            bound = asyncio.get_running_loop().call_later(SECONDS, connection.terminate)
            try:
                async with _snapshot(connection, plans):
                    yield Tables(connection, await connection.fetchval(_POSITION))
            finally:
                bound.cancel()
    except asyncpg.QueryCanceledError as error:
        raise DatabaseUnavailable("the database took too long; ask for less") from error


@asynccontextmanager
async def _snapshot(connection: Connection, plans: str) -> AsyncIterator[None]:
    try:
        await connection.execute(_BEGIN.format(SECONDS * 1000 - 100, plans))
        yield
    finally:
        await connection.execute("rollback")


async def position(pool: Pool) -> int:
    """The last event of the log the tables tell of, 0 before the first.

    Raises:
        DatabaseUnavailable: as :func:`looking`.
    """
    async with looking(pool) as tables:
        return tables.seq
