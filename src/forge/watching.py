"""``forge top``: how the whole stands at one moment, over log, database, volume and what workers tell.

Whatever does not answer is named in the frame, and what it would have told is missing there.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

import asyncpg
import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from forge import database
from forge.broker import connect, request
from forge.comfyui.backends import BackendStatus
from forge.credentials import OPERATOR, login
from forge.database import Connection, Pool
from forge.domain.disk import rank
from forge.errors import ForgeError, LogUnavailable
from forge.projections import queue, stats
from forge.resources import Capacity
from forge.settings import Settings
from forge.topology import ALL_PROGRESS, BACKENDS, DISPATCH, EVENTS, METRICS
from forge.workers.projector import PROJECTIONS
from forge.workers.standing import TELL_SECONDS, Standing

T = TypeVar("T")

SECONDS = 2.0
"""How long a server may take to answer for one frame."""

MOST_RUNNING = 20
_HEARD_SECONDS = 3.0
_RATE_SECONDS = 60.0


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """A job that runs; ``progress`` is the part of its current node that is done, where that is told."""

    id: UUID
    user_id: str
    job_type: str
    priority: int
    attempt: int
    seconds: float
    backend: str | None
    worker: str | None
    progress: float | None = None


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """The queue: jobs in all and in back-off, seconds since the oldest was asked for; the most come first."""

    jobs: int = 0
    backing_off: int = 0
    oldest: float = 0.0
    by_user: dict[str, int] = {}
    by_type: dict[str, int] = {}


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """The asset volume in bytes; ``level`` is 0 ok, 1 warn, 2 clean, 3 full."""

    used: int
    limit: int
    free: int
    level: int


class Frame(msgspec.Struct, frozen=True, kw_only=True):
    """One moment. ``lag`` is events the tables are behind, by stream; ``hour``, jobs by outcome since the
    hour began; ``per_minute``, how many ended while it was watched."""

    at: datetime
    missing: list[str]
    places: int | None = None
    orders: int | None = None
    running: list[Running] | None = None
    waiting: Waiting | None = None
    backends: list[BackendStatus] | None = None
    disk: Room | None = None
    lag: dict[str, int] | None = None
    hour: dict[str, int] | None = None
    per_minute: float | None = None


class _Progress(msgspec.Struct):
    job_id: UUID
    value: float
    max: float


class _StreamState(msgspec.Struct):
    last_seq: int
    messages: int


class _StreamConfig(msgspec.Struct):
    max_msgs: int


class _Stream(msgspec.Struct):
    state: _StreamState
    config: _StreamConfig


class Watch:
    """What is needed for one frame after the other; use :func:`watching`."""

    def __init__(self, settings: Settings, pool: Pool) -> None:
        self._settings, self._pool = settings, pool
        self._capacity = Capacity(settings)
        self._nc: Client | None = None
        self._progress: dict[UUID, tuple[float, float]] = {}
        self._standings: dict[str, tuple[float, list[BackendStatus]]] = {}
        self._ended: deque[tuple[float, int]] = deque()

    async def frame(self) -> Frame:
        """How it stands now."""
        missing: list[str] = []
        streams, rows, disk = await asyncio.gather(
            _answer(self._streams, "NATS", missing),
            _answer(self._rows, "Postgres", missing),
            _answer(self._disk, "the asset volume", missing),
        )
        found = Frame(at=datetime.now(UTC), missing=sorted(missing), disk=disk, backends=self._backends())
        if streams is not None:
            orders = streams[DISPATCH]
            found = msgspec.structs.replace(
                found, places=orders.config.max_msgs, orders=orders.state.messages
            )
        if rows is not None:
            found = msgspec.structs.replace(
                found,
                running=[self._running(row) for row in rows.running],
                waiting=_waiting(rows.waiting),
                hour=rows.hour,
                per_minute=self._per_minute(rows.hour),
            )
        if streams is not None and rows is not None:
            found = msgspec.structs.replace(found, lag=_lag(streams, rows.positions))
        return found

    # ---------------------------------------------------------------- asking

    async def _streams(self) -> dict[str, _Stream]:
        nc = await self._connected()
        names = (EVENTS, DISPATCH, METRICS)
        answers = await asyncio.gather(*(request(nc, f"STREAM.INFO.{n}", timeout=SECONDS) for n in names))
        return {n: msgspec.json.decode(a, type=_Stream) for n, a in zip(names, answers, strict=True)}

    async def _connected(self) -> Client:
        if self._nc is None:
            operator = login(self._settings.nats_passwords_dir, OPERATOR)
            self._nc = await connect(self._settings.nats_url, "top", operator)
            await self._nc.subscribe(ALL_PROGRESS, cb=self._hear_progress)
            await self._nc.subscribe(BACKENDS, cb=self._hear_backends)
            await self._nc.flush()
            await asyncio.sleep(1.2 * TELL_SECONDS)  # until every worker has said how the backends stand
        if not self._nc.is_connected:
            raise LogUnavailable("NATS does not answer")
        return self._nc

    async def _rows(self) -> _Rows:
        async with database.answering(), self._pool.acquire(timeout=SECONDS) as connection:
            return await _read(connection)

    async def _disk(self) -> Room:
        disk = await self._capacity.disk()
        level = rank(disk, self._capacity.lines)
        return Room(used=disk.used, limit=disk.limit, free=disk.free, level=level)

    # --------------------------------------------------------------- hearing

    async def _hear_progress(self, message: Msg) -> None:
        with suppress(msgspec.MsgspecError):
            told = msgspec.json.decode(message.data, type=_Progress)
            self._progress[told.job_id] = time.monotonic(), told.value / told.max if told.max > 0 else 0.0

    async def _hear_backends(self, message: Msg) -> None:
        with suppress(msgspec.MsgspecError):
            told = msgspec.json.decode(message.data, type=Standing)
            self._standings[told.worker] = time.monotonic(), told.backends

    def _backends(self) -> list[BackendStatus] | None:
        """As the worker sees them that can use most; None while no worker speaks."""
        since = time.monotonic() - _HEARD_SECONDS
        views = [backends for at, backends in self._standings.values() if at > since]
        return max(views, default=None, key=lambda view: [backend.healthy for backend in view])

    def _running(self, row: asyncpg.Record) -> Running:
        at, progress = self._progress.get(row["id"], (0.0, None))
        return Running(
            id=row["id"],
            user_id=row["user_id"],
            job_type=row["job_type"],
            priority=row["priority"],
            attempt=row["attempts"],
            seconds=row["seconds"],
            backend=row["backend"],
            worker=row["locked_by"],
            progress=progress if time.monotonic() - at < row["seconds"] + 1 else None,
        )

    def _per_minute(self, hour: dict[str, int]) -> float | None:
        """Of what ended in the last minute, or since it is watched; None until there are two frames."""
        now, ended = time.monotonic(), sum(n for outcome, n in hour.items() if outcome != "submitted")
        if self._ended and ended < self._ended[-1][1]:
            self._ended.clear()  # another hour began
        self._ended.append((now, ended))
        while now - self._ended[0][0] > _RATE_SECONDS:
            self._ended.popleft()
        began, before = self._ended[0]
        return (ended - before) * 60 / (now - began) if now > began else None

    async def close(self) -> None:
        """Let the connection go."""
        if self._nc is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._nc.close(), 1.0)


class _Rows(msgspec.Struct, frozen=True):
    running: list[asyncpg.Record]
    waiting: list[asyncpg.Record]
    hour: dict[str, int]
    positions: dict[str, int]


async def _read(connection: Connection) -> _Rows:
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    hour: dict[str, int] = {}
    for row in await stats.outcomes(connection, now):
        hour[row["outcome"]] = hour.get(row["outcome"], 0) + row["jobs"]
    positions: dict[str, int] = {}
    for projection in PROJECTIONS:
        at = await projection.position(connection)
        positions[projection.stream] = min(positions.get(projection.stream, at), at)
    return _Rows(
        await queue.running(connection, MOST_RUNNING), await queue.waiting(connection), hour, positions
    )


def _waiting(rows: list[asyncpg.Record]) -> Waiting:
    [whole] = [row for row in rows if row["name"] is None]
    most_first = sorted((row for row in rows if row["name"] is not None), key=lambda row: -row["jobs"])
    return Waiting(
        jobs=whole["jobs"],
        backing_off=whole["backing_off"],
        oldest=whole["oldest"],
        by_user={row["name"]: row["jobs"] for row in most_first if row["of_user"]},
        by_type={row["name"]: row["jobs"] for row in most_first if not row["of_user"]},
    )


def _lag(streams: dict[str, _Stream], positions: dict[str, int]) -> dict[str, int]:
    return {name: max(0, streams[name].state.last_seq - at) for name, at in positions.items()}


async def _answer(ask: Callable[[], Awaitable[T]], who: str, missing: list[str]) -> T | None:
    """What it answers, or None, with who did not among the ``missing``."""
    try:
        async with asyncio.timeout(2 * SECONDS):
            return await ask()
    except TimeoutError:
        missing.append(f"{who} does not answer")
    except (ForgeError, asyncpg.PostgresError) as error:
        missing.append(str(error))
    return None


@asynccontextmanager
async def watching(settings: Settings) -> AsyncIterator[Watch]:
    """A watch, over connections of its own; none of the servers need be there."""
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(
            database.opened(settings.postgres_dsn, most=1, command_timeout=SECONDS)
        )
        watch = Watch(settings, pool)
        stack.push_async_callback(watch.close)
        yield watch
