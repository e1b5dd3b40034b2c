"""Puts everything together, in this one place: opens NATS, Postgres and ComfyUI once, closes them in reverse.

A process is crash-only: whatever goes wrong beyond repair ends it, and its supervisor starts it again.
SIGTERM lets it finish what it has in hand; a second one ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import uvloop
from nats.aio.client import Client
from prometheus_client.metrics_core import Metric

from forge import closed, database, guard, replaying, telemetry, topology, watchdog
from forge.admissions import Admissions
from forge.broker import connect
from forge.comfyui.workflows import load as load_workflows
from forge.commands import Jobs
from forge.credentials import API, CLEANUP, OPERATOR, PROJECTOR, USER_OF_ROLE, WORKER, login
from forge.domain.dispatch import Line
from forge.errors import DatabaseUnavailable, ForgeError, LogUnavailable
from forge.eventstore import EventStore
from forge.images import Workshop
from forge.keys import Keys
from forge.library import Library, Shelf
from forge.projections.reading import position
from forge.replaying import Rebuilt, Step, rebuild
from forge.resources import Capacity
from forge.retention import Retention
from forge.settings import Settings
from forge.snapshots import Snapshots
from forge.store import Store
from forge.telemetry import numbers
from forge.uploads import Uploads
from forge.workers.status import Status

if TYPE_CHECKING:
    from forge.api.parts import Parts

log = logging.getLogger("forge")

ROLES = ("generation", "dispatcher", "projector", "cleanup", "scheduler")

NEEDS = {
    API: (topology.EVENTS, topology.DISPATCH),
    WORKER: (topology.EVENTS, topology.DISPATCH, topology.METRICS, topology.GENERATION_CONSUMER),
    PROJECTOR: (topology.EVENTS, topology.METRICS),
    CLEANUP: (topology.EVENTS, topology.CLEANUP_CONSUMER),
}
"""What has to be there for a user of NATS; none of them may make it."""

DRAIN_SECONDS = 15.0
"""How long a worker that is told to stop may finish what it has in hand."""

_EXIT_FAILED = 70


async def setup(settings: Settings) -> list[str]:
    """Streams, consumers and migrations; may be repeated. Returns a line for each thing and what was done.

    Raises:
        TopologyDiffers, MigrationFailed: what cannot be changed, and why.
        LogDamaged: there is a log, and it is not whole.
        LogUnavailable, DatabaseUnavailable: a server does not answer.
    """
    nc = await connect(settings.nats_url, "setup", login(settings.nats_passwords_dir, OPERATOR))
    try:
        await topology.await_leader(nc)
        await guard.at_start(EventStore(nc), settings.postgres_dsn)
        await database.check_not_newer(settings.postgres_dsn)  # before streams become what they were once
        changes = await topology.apply(nc, replicas=settings.nats_replicas)
    finally:
        await nc.close()
    done = [f"{change.name}: {change.outcome}" for change in changes]
    return done + [f"{name}: applied" for name in await database.migrate(settings.postgres_dsn)]


@asynccontextmanager
async def keys(settings: Settings) -> AsyncIterator[Keys]:
    """Acts on API keys, over a connection of their own.

    Raises:
        LogUnavailable: NATS does not answer.
    """
    nc = await connect(settings.nats_url, "keys", login(settings.nats_passwords_dir, OPERATOR))
    try:
        async with closed.found(nc, settings.postgres_dsn) as before:
            yield Keys(EventStore(nc, before=before))
    finally:
        await nc.close()


async def replay(
    settings: Settings, names: Collection[str], *, replace: bool, progress: Callable[[Step], None]
) -> Rebuilt:
    """Rebuild the tables of some projections from the log, see :func:`forge.replaying.rebuild`."""
    from forge.workers.projector import PROJECTIONS

    await _migrated(settings)
    async with AsyncExitStack() as stack:
        nc = await connect(settings.nats_url, "replay", login(settings.nats_passwords_dir, OPERATOR))
        stack.push_async_callback(nc.close)
        pool = await stack.enter_async_context(
            database.opened(settings.postgres_dsn, most=4, command_timeout=600.0)
        )
        chosen = [projection for projection in PROJECTIONS if projection.name in names]
        return await rebuild(nc, pool, chosen, replace=replace, progress=progress)


async def drop_old(settings: Settings) -> bool:
    """Let go what a replay left or replaced, see :func:`forge.replaying.drop_old`."""
    async with database.opened(settings.postgres_dsn, most=1) as pool:
        return await replaying.drop_old(pool)


# ------------------------------------------------------------------- workers


def run_worker(settings: Settings, roles: frozenset[str]) -> int:
    """Run some roles until told to stop; the exit status."""
    telemetry.start("worker", settings.log_level)
    return uvloop.run(_until_stopped(_worker(settings, roles)))


async def _worker(settings: Settings, roles: frozenset[str]) -> None:
    stop = _stop_on_signals()
    status = Status(stop)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(telemetry.exporting("worker", _own_numbers))
        fields: dict[str, Any] = {"roles": sorted(roles)}
        if settings.worker_port is not None:
            serving = status.serving(settings.host, settings.worker_port)
            fields["port"] = await stack.enter_async_context(serving)
        users = sorted({USER_OF_ROLE[role] for role in roles})
        connections = {user: await _nats(stack, settings, user) for user in users}
        if not await _came(_await_log(connections, settings.postgres_dsn), stop):
            return
        before = await stack.enter_async_context(closed.found(connections[users[0]], settings.postgres_dsn))
        logs = {user: EventStore(nc, before=before) for user, nc in connections.items()}
        endless, draining = await _roles(stack, logs, settings, roles, stop, status)
        status.checks["log"] = logs[users[0]].head
        status.working = True
        log.info("working", extra=fields)
        await _run(endless, draining, stop)


async def _own_numbers() -> Iterable[Metric]:
    return numbers.registry.collect()


async def _roles(
    stack: AsyncExitStack,
    logs: dict[str, EventStore],
    settings: Settings,
    roles: frozenset[str],
    stop: asyncio.Event,
    status: Status,
) -> tuple[list[Coroutine[Any, Any, None]], list[Coroutine[Any, Any, None]]]:
    """The work of each role: what ends only by being cancelled, and what finishes after ``stop``."""
    endless: list[Coroutine[Any, Any, None]] = []
    draining: list[Coroutine[Any, Any, None]] = []
    if roles & {"generation", "cleanup", "scheduler"}:
        store = await opened_store(settings, next(iter(logs.values())))
    pool = await stack.enter_async_context(database.opened(settings.postgres_dsn))
    if roles & {"projector", "cleanup", "scheduler"}:
        await _migrated(settings)
        status.checks["database"] = partial(position, pool)
    if "dispatcher" in roles:
        from forge.workers.dispatcher import Dispatcher, DispatcherState

        every = settings.snapshot_events
        snapshots = Snapshots(pool, logs[WORKER], "dispatcher", DispatcherState, every)
        endless.append(Dispatcher(logs[WORKER], snapshots).run())
    if "projector" in roles:
        from forge.workers import archivist, projector

        nc = logs[PROJECTOR].nc
        endless += [projector.run(nc, pool), archivist.run(nc, pool)]
    if "generation" in roles:
        draining.append(await _generation(stack, logs[WORKER], store, settings, stop))
    if "cleanup" in roles:
        from forge.workers.cleanup import Cleanup

        retention = Retention(logs[CLEANUP], pool, store, settings)
        draining.append(Cleanup(retention, settings.cleanup_grace_seconds).run(stop))
    if "scheduler" in roles:
        from forge.workers.scheduler import Scheduler

        retention = Retention(logs[WORKER], pool, store, settings)
        scheduler = Scheduler(logs[WORKER].nc, pool, store, settings, retention)
        draining.append(scheduler.run(stop))
    return endless, draining


async def _generation(
    stack: AsyncExitStack,
    events: EventStore,
    store: Store,
    settings: Settings,
    stop: asyncio.Event,
) -> Coroutine[Any, Any, None]:
    from forge.comfyui.backends import Backends
    from forge.comfyui.folders import shared
    from forge.comfyui.patience import patience
    from forge.workers.attempt import Studio
    from forge.workers.generation import Generation
    from forge.workers.thumbnails import Thumbnails

    patient = patience(
        unreachable=settings.comfyui_unreachable_seconds,
        cancel=settings.comfyui_cancel_seconds,
        quarantine=settings.comfyui_quarantine_seconds,
    )
    workshop = await stack.enter_async_context(Workshop())
    studio = Studio(
        worker=f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}",
        nc=events.nc,
        jobs=Jobs(events),
        library=Library(events),
        uploads=Uploads(events),
        shelf=Shelf(events, store, settings.ttl_of),
        backends=await stack.enter_async_context(Backends(settings.comfyui_urls, patient)),
        folders=shared(settings.comfyui_urls, settings.comfyui_dirs),
        workflows=load_workflows(settings.workflows_dir, models=settings.models),
        store=store,
        workshop=workshop,
        thumbnails=Thumbnails(store, workshop),
        ttl_of=settings.ttl_of,
        capacity=Capacity(settings),
    )
    return Generation(studio).run(stop)


async def _run(
    endless: list[Coroutine[Any, Any, None]], draining: list[Coroutine[Any, Any, None]], stop: asyncio.Event
) -> None:
    """Run all roles; the first that fails ends the process, and stopping waits for what is in hand."""
    loops = [asyncio.create_task(work) for work in endless]
    drains = [asyncio.create_task(work) for work in draining]
    told = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({*loops, *drains, told}, return_when=asyncio.FIRST_COMPLETED)
        if told not in done:
            for task in done:
                task.result()
        if drains:
            await asyncio.wait(drains, timeout=DRAIN_SECONDS)
    finally:
        for task in (*loops, *drains, told):
            task.cancel()
        await asyncio.gather(*loops, *drains, told, return_exceptions=True)


# ----------------------------------------------------------------------- API


def run_api(settings: Settings, *, open_to_loopback: bool = False) -> int:
    """Serve the API until told to stop; the exit status.

    ``open_to_loopback`` takes requests from this machine without a key as those of an operator: only
    ``forge dev`` says so, and only where no keys are set.
    """
    telemetry.start("api", settings.log_level)
    return uvloop.run(_until_stopped(_api(settings, open_to_loopback)))


async def _api(settings: Settings, open_to_loopback: bool) -> None:
    # imported here, because workers do without the web framework and start faster for it
    from forge.api.app import create_app
    from forge.api.serving import serve

    stop = _stop_on_signals()
    async with AsyncExitStack() as stack:
        nc = await _nats(stack, settings, API)
        if not await _came(_await_log({API: nc}, settings.postgres_dsn), stop):
            return
        try:
            await database.migrate(settings.postgres_dsn)
        except DatabaseUnavailable as error:  # requests are accepted without it
            log.warning("starting without the database", extra={"error": error.detail})
        parts = await _parts(stack, settings, nc, open_to_loopback)
        app = create_app(parts)
        await stack.enter_async_context(telemetry.exporting("api", app.metrics.now))
        await serve(app, parts.live, settings.host, settings.port, stop, settings.leave_seconds)


async def _parts(stack: AsyncExitStack, settings: Settings, nc: Client, open_to_loopback: bool) -> Parts:
    """What the routes of an API work with."""
    from forge.api.live import Live
    from forge.api.parts import Parts
    from forge.api.reads import ReadCounter

    pool = await stack.enter_async_context(database.opened(settings.postgres_dsn, command_timeout=5.0))
    events = EventStore(nc, before=await closed.find(nc, pool))
    blobs = await opened_store(settings, events)
    capacity = Capacity(settings)
    admissions = Admissions(
        events,
        Line(),
        queue_limit=settings.queue_limit,
        rate_per_hour=settings.rate_per_hour,
        guard=capacity.room,
        shelf=Shelf(events, blobs, settings.ttl_of),
    )
    reads = ReadCounter(events, f"{socket.gethostname()}-{settings.port}")
    await stack.enter_async_context(reads.flushing(settings.access_flush_seconds))
    return Parts(
        settings=settings,
        nc=nc,
        store=events,
        admissions=admissions,
        jobs=admissions.jobs,
        library=Library(events),
        uploads=Uploads(events),
        keys=Keys(events),
        reads=reads,
        retention=Retention(events, pool, blobs, settings),
        pool=pool,
        workflows=load_workflows(settings.workflows_dir, models=settings.models),
        blobs=blobs,
        capacity=capacity,
        workshop=await stack.enter_async_context(Workshop()),
        live=Live(nc, admissions, pool, snapshot_events=settings.snapshot_events),
        open_to_loopback=open_to_loopback,
    )


# -------------------------------------------------------------------- shared


async def _until_stopped(work: Awaitable[None]) -> int:
    """Run to the end; the exit status says whether starting again may help.

    Raises:
        ForgeError: it cannot help: what is wrong must be mended first.
    """
    try:
        with watchdog.watched(_EXIT_FAILED):
            await work
    except (ForgeError, ExceptionGroup) as error:
        known = list(_leaves(error))
        for leaf in known:
            if not leaf.retryable:
                raise leaf from None
        if not known:
            raise
        log.error("stopped: %s", known[0].detail)
        return _EXIT_FAILED
    return 0


def _leaves(error: BaseException) -> Iterator[ForgeError]:
    if isinstance(error, ForgeError):
        yield error
    elif isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)


async def _nats(stack: AsyncExitStack, settings: Settings, user: str) -> Client:
    """A connection as this user, whose end is the end of the process."""

    async def closed() -> None:
        if not leaving:
            os._exit(_EXIT_FAILED)  # a client never returns from CLOSED: the supervisor starts another

    leaving: list[bool] = []
    nc = await connect(settings.nats_url, user, login(settings.nats_passwords_dir, user), on_closed=closed)

    async def leave() -> None:
        leaving.append(True)
        await nc.close()

    stack.push_async_callback(leave)
    return nc


async def opened_store(settings: Settings, events: EventStore) -> Store:
    """The asset volume; an empty one is taken for new only while the log knows of no picture.

    Raises:
        StoreMissing: the volume that should be there is not.
    """
    store = Store(settings.assets_dir)
    known = await events.last(topology.ALL_STORED) or await events.last(topology.ALL_UPLOADS)
    await asyncio.to_thread(store.open, create=known is None)
    return store


async def _migrated(settings: Settings, patience: float = 30.0) -> None:
    """Wait for Postgres to come up, then bring it to this version."""
    deadline = asyncio.get_running_loop().time() + patience
    while True:
        try:
            await database.migrate(settings.postgres_dsn)
        except DatabaseUnavailable:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.2)
        else:
            return


async def _await_log(connections: dict[str, Client], dsn: str, patience: float = 30.0) -> None:
    """Wait until the log is led, and found whole, and each user has what it needs; from the start again where
    nobody answers in between: a leader was lost, or a stream is so new that it has none yet.

    Raises:
        LogUnavailable: still no answer.
        NotSetUp, LogDamaged, DatabaseUnavailable: as :mod:`forge.topology` and :mod:`forge.guard` say.
    """
    deadline = asyncio.get_running_loop().time() + patience
    nc = next(iter(connections.values()))
    while True:
        await topology.await_leader(nc)
        try:
            await guard.at_start(EventStore(nc), dsn)
            for user, each in connections.items():
                await topology.await_setup(each, NEEDS[user])
        except LogUnavailable:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(0.2)
        else:
            return


async def _came(awaited: Coroutine[Any, Any, None], stop: asyncio.Event) -> bool:
    """Whether what is waited for came; not, when told to stop before."""
    coming, told = asyncio.create_task(awaited), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({coming, told}, return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            coming.result()
        return coming.done()
    finally:
        for task in (coming, told):
            task.cancel()
        await asyncio.gather(coming, told, return_exceptions=True)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()

    def told() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()
        log.info("stopping when what is in hand is finished; told once more, at once")

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told)
    return stop
