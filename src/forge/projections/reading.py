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

# A list has many optional filters: planned for the values at hand, each becomes the index it can use.
_SETTINGS = "set local statement_timeout = 800; set local plan_cache_mode = force_custom_plan"

# usage follows another stream, whose sequences have nothing to do with these
_POSITION = """
select case when count(*) = 4 then min(seq) else 0 end
from projection_checkpoint where projection in ('queue', 'inventory', 'stats', 'uploads')
"""


class Snapshot(msgspec.Struct, frozen=True):
    """The tables at one moment; ``seq`` is the last event of the log they tell of."""

    connection: Connection
    seq: int


@asynccontextmanager
async def snapshot(pool: Pool, seconds: float = SECONDS) -> AsyncIterator[Snapshot]:
    """Look at the tables.

    Raises:
        DatabaseUnavailable: Postgres is away, frozen, or took too long.
    """
    try:
        async with answering(), pool.acquire(timeout=seconds) as connection:
            # A frozen server answers no cancellation either; ending the connection always works.
            bound = asyncio.get_running_loop().call_later(seconds, connection.terminate)
            try:
                async with connection.transaction(isolation="repeatable_read", readonly=True):
                    await connection.execute(_SETTINGS)
                    seq = await connection.fetchval(_POSITION)
                    yield Snapshot(connection, seq)
            finally:
                bound.cancel()
    except asyncpg.QueryCanceledError as error:
        raise DatabaseUnavailable("the database took too long; ask for less") from error


async def position(pool: Pool) -> int:
    """The last event of the log the tables tell of, 0 before the first.

    Raises:
        DatabaseUnavailable: as :func:`snapshot`.
    """
    async with snapshot(pool) as tables:
        return tables.seq
