"""Reading what was written: ``min_seq`` on every read, and a second look before "there is no such thing"."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, TypeVar
from uuid import UUID

from litestar import Response
from litestar.params import QueryParameter

from forge.api import checkpoint
from forge.api.edge import MAX_SEQ, invalid
from forge.api.parts import Parts
from forge.database import Connection
from forge.errors import NotFound, Unavailable
from forge.projections import reading
from forge.projections.reading import Tables, looking

T = TypeVar("T")

MinSeq = Annotated[
    int | None,
    QueryParameter(
        ge=0, le=MAX_SEQ, description="Wait, for up to 5 s, until the answer tells of this event of the log."
    ),
]

_MISSING_SECONDS = 1.0
_CHANGED_SECONDS = 0.5
_LOOK_SECONDS = 0.02


@asynccontextmanager
async def listing(
    parts: Parts, min_seq: int | None, *, plans: str = reading.EACH_TIME
) -> AsyncIterator[Tables]:
    """The tables, when they tell of ``min_seq``; ``plans`` as for :func:`looking`.

    Raises:
        Invalid: there is no such event yet. Nobody can have been told of it, so it is not waited for.
        Unavailable: they do not in time, or Postgres does not answer.
    """
    if min_seq is not None:
        await _happened(parts, min_seq)
        await parts.live.checkpoint.wait(min_seq, checkpoint.WAIT_SECONDS)
    async with AsyncExitStack() as stack:
        tables = await stack.enter_async_context(looking(parts.pool, plans=plans))
        if tables.seq == 0 and parts.live.newest:
            await stack.aclose()
            await _filled(parts)
            tables = await stack.enter_async_context(looking(parts.pool, plans=plans))
        yield tables


async def _filled(parts: Parts) -> None:
    """Tables that tell of nothing at all are new, or somebody emptied them: a list of them would be a lie.

    Raises:
        Unavailable: they still do not, after a moment.
    """
    deadline = time.monotonic() + _MISSING_SECONDS
    while await reading.position(parts.pool) == 0:
        if time.monotonic() > deadline:
            raise Unavailable("the tables are being made from the log; come again")
        await asyncio.sleep(_LOOK_SECONDS)


async def _happened(parts: Parts, seq: int) -> None:
    if seq <= max(parts.live.newest, parts.live.checkpoint.seq):
        return
    head = await parts.store.head()
    if seq > head:
        raise invalid("min_seq", f"is beyond the log, which ends at {head}")


async def item(
    parts: Parts,
    min_seq: int | None,
    look: Callable[[Connection], Awaitable[T | None]],
    otherwise: str,
    about: UUID | None = None,
) -> Response[T]:
    """What ``look`` finds. Before it counts as missing the tables must have caught up with what this process
    knows of, so that nobody is told that what was just accepted does not exist. Likewise what this process
    did to the thing ``about`` a moment ago is waited for, but not for long.

    Raises:
        NotFound: there is no such thing, ``otherwise`` says so.
        Unavailable: the tables are behind.
    """
    newest = parts.live.newest
    if about is not None:
        await parts.live.checkpoint.passed(parts.live.changed(about), _CHANGED_SECONDS)
    async with listing(parts, min_seq, plans=reading.ONCE) as tables:
        found = await look(tables.connection)
    if found is None and tables.seq < newest:
        if not await parts.live.checkpoint.passed(newest, _MISSING_SECONDS):
            raise Unavailable("the tables are behind the log; come again")
        async with looking(parts.pool, plans=reading.ONCE) as tables:
            found = await look(tables.connection)
    if found is None:
        raise NotFound(otherwise)
    return Response(found, headers={"x-forge-seq": str(tables.seq)})
