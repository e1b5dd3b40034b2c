"""``forge jobs`` and ``forge assets``: what the tables hold, page by page, and what the log tells of one.

Lists need Postgres alone. They are the API's, as an operator sees them, or one user.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import msgspec

from forge import closed, database, provenance
from forge.api.jobs import history_item
from forge.api.schemas import AssetView, HistoryItem, JobView
from forge.api.views import asset_of_row, job_of_row
from forge.broker import connect
from forge.credentials import OPERATOR, login
from forge.database import Connection
from forge.errors import NotFound
from forge.eventstore import EventStore
from forge.projections import asset_lists, queue
from forge.settings import Settings

PAGE = 500

T = TypeVar("T")
Place = tuple[Any, UUID]


class Told(msgspec.Struct, frozen=True):
    """A job or an asset with everything that happened to it; None where the tables have it no more."""

    now: JobView | AssetView | None
    history: list[HistoryItem]


async def jobs(
    settings: Settings, user: str | None, wanted: queue.Wanted, limit: int | None
) -> AsyncGenerator[JobView]:
    """Jobs, newest first, as they are read.

    Raises:
        DatabaseUnavailable: no answer.
    """
    async with _tables(settings) as connection:

        async def page(after: Place | None, size: int) -> list[asyncpg.Record]:
            return await queue.page(connection, user, wanted, after, size)

        async with aclosing(_pages(page, lambda row: row["created_at"], limit)) as rows:
            async for row in rows:
                yield job_of_row(row, None)


async def assets(
    settings: Settings, user: str | None, wanted: asset_lists.Wanted, order: str, limit: int | None
) -> AsyncGenerator[AssetView]:
    """Assets in one of ``asset_lists.ORDERS``, as they are read.

    Raises:
        DatabaseUnavailable: no answer.
    """
    async with _tables(settings) as connection:

        async def page(after: Place | None, size: int) -> list[asyncpg.Record]:
            return await asset_lists.page(connection, user, wanted, order, after, size)

        async with aclosing(_pages(page, lambda row: row[order.removeprefix("-")], limit)) as rows:
            async for row in rows:
                yield asset_of_row(row)


async def job(settings: Settings, job_id: UUID) -> Told:
    """One job.

    Raises:
        NotFound: there is none.
        DatabaseUnavailable, LogUnavailable: no answer.
    """
    async with _tables(settings) as connection:
        row = await queue.job(connection, job_id, None)
    if row is None:
        raise NotFound(f"there is no job {job_id}")
    async with _log(settings) as events:
        records = await provenance.of_job(
            events, job_id, row["user_id"], row["submitted_seq"], row["admitted_seq"]
        )
    return Told(job_of_row(row, None), [history_item(record) for record in records])


async def asset(settings: Settings, asset_id: UUID) -> Told:
    """One asset, also when it is long gone.

    Raises:
        NotFound: there never was one.
        DatabaseUnavailable, LogUnavailable: no answer.
    """
    async with _tables(settings) as connection:
        row = await asset_lists.asset(connection, asset_id, None)
    async with _log(settings) as events:
        records = await provenance.facts(events, asset_id)
    if row is None and not records:
        raise NotFound(f"there is no asset {asset_id}")
    return Told(asset_of_row(row) if row else None, [history_item(record) for record in records])


@asynccontextmanager
async def _tables(settings: Settings) -> AsyncIterator[Connection]:
    async with (
        database.opened(settings.postgres_dsn, most=1, command_timeout=60.0) as pool,
        database.answering(),
        pool.acquire() as connection,
    ):
        yield connection


@asynccontextmanager
async def _log(settings: Settings) -> AsyncIterator[EventStore]:
    nc = await connect(settings.nats_url, "list", login(settings.nats_passwords_dir, OPERATOR))
    try:
        async with closed.found(nc, settings.postgres_dsn) as before:
            yield EventStore(nc, before=before)
    finally:
        await nc.close()


async def _pages(
    page: Callable[[Place | None, int], Awaitable[list[asyncpg.Record]]],
    key: Callable[[asyncpg.Record], Any],
    limit: int | None,
) -> AsyncGenerator[asyncpg.Record]:
    """Row after row; only one page is in memory."""
    after: Place | None = None
    left = limit
    while left is None or left > 0:
        size = PAGE if left is None else min(PAGE, left)
        rows = await page(after, size)
        for row in rows:
            yield row
        if len(rows) < size:
            return
        after = (key(rows[-1]), rows[-1]["id"])
        left = None if left is None else left - size
