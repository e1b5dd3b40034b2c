"""Rebuilding tables from the log while everything serves: the ordinary projections, into tables beside the
live ones, compared with them at one event, caught up, and swapped.

A replay that is killed leaves a schema that the next one drops. Two at once are one too many: Postgres lets
one have the lock, for as long as its connection lives.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import asyncpg
import msgspec
from nats.aio.client import Client

from forge import chronicle, closed, guard
from forge.database import Connection, Pool, answering
from forge.errors import ForgeError, LogUnavailable, ReplayRefused
from forge.events.envelope import Recorded
from forge.eventstore import EventStore
from forge.follower import Batch
from forge.projections import shadow
from forge.projections.projection import Projection, advance
from forge.projections.shadow import BEFORE, SHADOW, Difference, Position, Shadow
from forge.topology import ALL_EVENTS, ALL_METRICS, EVENTS, METRICS

BATCH = 4000
"""Events written in one transaction: more are hardly quicker, and all of them are in memory."""

LONG = 5000
"""A log with so many events fills missing tables beside their place: readers get all of it or none."""

_AHEAD = 2 * BATCH
"""Events that are read while others are being written."""

_LOCK = 0x666F726765_01
_LOCK_SECONDS = 3.0
"""The server may take a moment to notice that a killed replay is gone."""

_SILENT_SECONDS = 60.0
_PATIENCE_MS = 250
_SWAP_SECONDS = 300.0
_FILTERS = {EVENTS: ALL_EVENTS, METRICS: ALL_METRICS}


class Step(msgspec.Struct, frozen=True):
    """What a replay does now, and how much of it is done: events where it reads, else things to do."""

    what: str
    done: int
    of: int


class Rebuilt(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay did. ``compared`` projections equalled the live ones, or differed as told and were
    replaced nevertheless; others had nothing to be compared with. ``kept`` says whether the old tables are
    still there, in the schema ``forge_before``."""

    projections: tuple[str, ...]
    events: int
    seconds: float
    seq: dict[str, int]
    compared: tuple[str, ...]
    differences: tuple[Difference, ...]
    kept: bool


Progress = Callable[[Step], None]


def _silent(_: Step) -> None:
    pass


async def rebuild(
    nc: Client,
    pool: Pool,
    projections: Sequence[Projection],
    *,
    replace: bool = False,
    progress: Progress = _silent,
) -> Rebuilt:
    """Make the tables of some projections again, and put them in the place of the live ones.

    ``replace`` does so although the live ones differ, and keeps those.

    Raises:
        ReplayRefused: another replay is under way; a view stands in the way; the tables differ; or somebody
            holds the live ones and would not let go.
        LogDamaged: the log is not the one, or not all, that the tables came from.
        LogUnavailable, LogUnreadable, DatabaseUnavailable: it cannot be done now; repeat it.
    """
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(answering())
        swapping = await stack.enter_async_context(pool.acquire())
        await _alone(swapping)
        await guard.check(EventStore(nc), swapping)
        live = await shadow.positions(swapping, await shadow.home(swapping))
        _not_newer(live, projections)
        folding = await stack.enter_async_context(pool.acquire())
        made = await shadow.make(folding, projections)
        folds = [
            await stack.enter_async_context(_fold(store, folding, projections, progress))
            for store in await _stores(nc, pool, projections)
        ]
        for fold in folds:
            await fold.upto(fold.comparable(live) or await fold.head())
        await shadow.finish(pool, made, lambda done, of: progress(Step("indexing", done, of)))
        compared, found = await _compare(pool, folding, made, folds, progress)
        if found and not replace:
            raise ReplayRefused(_differ(found))
        for fold in folds:
            await fold.upto(await fold.head())
        await _swap(swapping, made, folds, progress)
        kept = bool(found) or any(p.name in live and p.name not in compared for p in projections)
        if not kept:
            await shadow.drop(swapping, BEFORE)
        return Rebuilt(
            projections=tuple(p.name for p in projections),
            events=sum(fold.events for fold in folds),
            seconds=round(time.monotonic() - began, 3),
            seq={fold.stream: fold.position for fold in folds},
            compared=tuple(compared),
            differences=tuple(found),
            kept=kept,
        )


async def _stores(nc: Client, pool: Pool, projections: Sequence[Projection]) -> list[EventStore]:
    """The streams these are made from, each once; the log with what was closed of it."""
    before = await closed.find(nc, pool)
    streams = dict.fromkeys(projection.stream for projection in projections)
    return [EventStore(nc, stream, before if stream == EVENTS else None) for stream in streams]


async def drop_old(pool: Pool) -> bool:
    """Let go what the last replay replaced; whether there was anything.

    Raises:
        ReplayRefused: a replay is under way.
        DatabaseUnavailable: Postgres does not answer.
    """
    async with answering(), pool.acquire() as connection:
        await _alone(connection)
        await shadow.drop(connection, SHADOW)  # of a replay that was killed, or that found differences
        return await shadow.drop(connection, BEFORE)


async def due(connection: Connection, projections: Sequence[Projection], head: int) -> list[Projection]:
    """Those that have to be rebuilt: made by an older version, or missing though the log is long."""
    rows = await connection.fetch("select projection, version from projection_checkpoint")
    versions: dict[str, int] = {row["projection"]: row["version"] for row in rows}
    missing = 0 if head >= LONG else sys.maxsize
    return [p for p in projections if versions.get(p.name, missing) < p.version]


# --------------------------------------------------------------------- folding


def records(store: EventStore, after: int) -> AsyncGenerator[Batch, None]:
    """Everything in a stream behind a sequence, in order: the one place where a replay gets it from.

    Raises:
        LogUnreadable: an event cannot be decoded.
    """
    return chronicle.records(store, after + 1, (_FILTERS[store.stream],))


class _Fold:
    """One stream's events on their way into the shadow: read ahead, and written up to where it is wanted."""

    def __init__(
        self,
        store: EventStore,
        connection: Connection,
        projections: Sequence[Projection],
        progress: Progress,
    ) -> None:
        self.store, self.connection, self.stream, self.progress = store, connection, store.stream, progress
        self.projections = [p for p in projections if p.stream == store.stream]
        self.positions = dict.fromkeys((p.name for p in self.projections), 0)
        self.read: deque[Recorded] = deque()
        self.failed: ForgeError | None = None
        self.news, self.room = asyncio.Event(), asyncio.Event()
        self.events = 0

    @property
    def position(self) -> int:
        return min(self.positions.values())

    def comparable(self, live: Mapping[str, Position]) -> int:
        """The one event all these have come to in the live tables, by this very version; else 0."""
        places = [live.get(p.name) for p in self.projections]
        seqs = {
            place.seq if place and place.version == p.version else 0
            for place, p in zip(places, self.projections, strict=True)
        }
        return seqs.pop() if len(seqs) == 1 else 0

    async def head(self) -> int:
        """The last event that can be read."""
        state = await self.store.state()
        return state.head if state.last_at is not None else 0

    async def run(self) -> None:
        """Read ahead, for ever or until something cannot be read."""
        try:
            async with aclosing(records(self.store, 0)) as batches:
                async for batch in batches:
                    self.read.extend(batch.records)
                    self.news.set()
                    while len(self.read) >= _AHEAD:
                        self.room.clear()
                        await self.room.wait()
        except ForgeError as error:
            self.failed = error
            self.news.set()

    async def upto(self, goal: int) -> None:
        """Take in every event up to ``goal`` that there is: samples do not stay for ever."""
        goal = min(goal, await self.head())
        while self.position < goal and (taken := await self._take(goal)):
            self.positions = await advance(self.connection, self.projections, taken, self.positions)
            self.events += len(taken)
            self.progress(Step("reading", self.position, goal))

    async def _take(self, goal: int) -> list[Recorded]:
        """As many as one transaction holds, or all up to ``goal``."""
        while len(self.read) < BATCH and not (self.read and self.read[-1].seq >= goal):
            await self._more()
        taken: list[Recorded] = []
        while self.read and len(taken) < BATCH and self.read[0].seq <= goal:
            taken.append(self.read.popleft())
        self.room.set()
        return taken

    async def _more(self) -> None:
        if self.failed:
            raise self.failed
        self.news.clear()
        try:
            async with asyncio.timeout(_SILENT_SECONDS):
                await self.news.wait()
        except TimeoutError:
            raise LogUnavailable(f"{self.stream} gave nothing for {_SILENT_SECONDS:.0f} s") from None


@asynccontextmanager
async def _fold(
    store: EventStore, connection: Connection, projections: Sequence[Projection], progress: Progress
) -> AsyncIterator[_Fold]:
    fold = _Fold(store, connection, projections, progress)
    reading = asyncio.create_task(fold.run(), name=f"replay {store.stream}")
    try:
        yield fold
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


# ---------------------------------------------------- comparing and swapping


async def _compare(
    pool: Pool, folding: Connection, made: Shadow, folds: Sequence[_Fold], progress: Progress
) -> tuple[list[str], list[Difference]]:
    """Which projections could be compared with the live ones, at one event, and what differs."""
    compared: list[str] = []
    found: list[Difference] = []
    async with pool.acquire() as looking, looking.transaction(isolation="repeatable_read", readonly=True):
        live = await shadow.positions(looking, made.live)
        for nth, fold in enumerate(folds):
            progress(Step("comparing", nth, len(folds)))
            seq = fold.comparable(live)
            if seq == 0 or seq < fold.position:
                continue
            await fold.upto(seq)
            tables = [table for projection in fold.projections for table in projection.tables]
            found += await shadow.differences(looking, folding, made, tables)
            compared += [projection.name for projection in fold.projections]
    return compared, found


def _differ(found: Sequence[Difference]) -> str:
    told = "; ".join(
        f"{one.table} has {one.live_rows} rows, rebuilt {one.rebuilt_rows}, different for example "
        f"{', '.join(one.examples)}"
        for one in found
    )
    return (
        f"what was rebuilt is not what is there, and nothing was changed: {told}. The rebuilt tables are "
        f"in the schema {SHADOW}. If the log is right, say --replace: the present tables are "
        f"then kept in {BEFORE}"
    )


async def _swap(connection: Connection, made: Shadow, folds: Sequence[_Fold], progress: Progress) -> None:
    async def catch_up(live: Mapping[str, Position]) -> None:
        for fold in folds:
            for projection in fold.projections:
                at = live.get(projection.name)
                if at is not None and at.version <= projection.version:
                    await fold.upto(at.seq)

    deadline, pause = time.monotonic() + _SWAP_SECONDS, 0.05
    progress(Step("swapping", 0, 1))
    while True:
        try:
            return await shadow.swap(connection, made, catch_up, patience_ms=_PATIENCE_MS)
        except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError) as error:
            if time.monotonic() > deadline:
                raise ReplayRefused(
                    f"somebody holds a table for over {_SWAP_SECONDS:.0f} s ({error}): see pg_stat_activity, "
                    "then replay again"
                ) from error
        await asyncio.sleep(pause)  # let those who waited behind us read
        pause = min(pause * 2, 2.0)


# ---------------------------------------------------------------------- alone


async def _alone(connection: Connection) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while not await connection.fetchval("select pg_try_advisory_lock($1)", _LOCK):
        if time.monotonic() > deadline:
            raise ReplayRefused("another replay is under way in this database: let it end first")
        await asyncio.sleep(0.1)


def _not_newer(live: Mapping[str, Position], projections: Sequence[Projection]) -> None:
    for projection in projections:
        at = live.get(projection.name)
        if at is not None and at.version > projection.version:
            raise ReplayRefused(
                f"{projection.name} is at version {at.version}, this forge knows {projection.version}: "
                "upgrade it"
            )
