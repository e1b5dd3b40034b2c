"""The generation role: as many loops as there are places, each running one order at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from uuid import UUID

import msgspec
from nats.aio.client import Client

from forge.errors import NotFound
from forge.events.jobs import JobCancelled
from forge.follower import follow
from forge.telemetry import CONSUMER, about, span
from forge.topology import ALL_CANCELLATIONS, DISPATCH, EVENTS, GENERATION, places
from forge.workers import abandoned, standing
from forge.workers.attempt import Attempt, Studio
from forge.workers.loop import Delivery, Outcome, consume
from forge.workers.numbers import in_hand
from forge.workers.orders import decode

log = logging.getLogger("forge.generation")


class Cancellations:
    """Hears of cancelled jobs from the log, so that a running one is stopped at once."""

    def __init__(self) -> None:
        self._watched: dict[UUID, list[asyncio.Event]] = {}

    @contextmanager
    def watch(self, job_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set when the job is cancelled from now on; read the job after entering."""
        notice = asyncio.Event()
        notices = self._watched.setdefault(job_id, [])
        notices.append(notice)
        try:
            yield notice
        finally:
            notices.remove(notice)
            if not notices:
                self._watched.pop(job_id, None)

    async def follow(self, nc: Client, start: int) -> None:
        """Listen for ever, from the log's sequence ``start`` on."""
        async with aclosing(follow(nc, start, (ALL_CANCELLATIONS,), stream=EVENTS)) as batches:
            async for batch in batches:
                for record in batch.records:
                    if isinstance(record.event, JobCancelled):
                        for notice in self._watched.get(record.event.job_id, ()):
                            notice.set()


class Generation:
    """One role of a worker process."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.cancellations = Cancellations()

    async def run(self, stop: asyncio.Event) -> None:
        """Run orders until ``stop`` is set and those in hand are finished."""
        nc, jobs = self.studio.nc, self.studio.jobs
        start = await jobs.store.head() + 1
        async with asyncio.TaskGroup() as aside:
            watches = [
                aside.create_task(self.cancellations.follow(nc, start)),
                aside.create_task(abandoned.watch(nc, jobs.store, self.studio.backends)),
                aside.create_task(self.studio.thumbnails.run()),
                aside.create_task(standing.tell(nc, self.studio.worker, self.studio.backends)),
            ]
            async with asyncio.TaskGroup() as loops:
                for _ in range(await places(nc)):
                    loops.create_task(
                        consume(nc, DISPATCH, GENERATION, self.handle, stop, self.studio.capacity.opened)
                    )
            for watch in watches:
                watch.cancel()

    async def handle(self, delivery: Delivery) -> Outcome:
        """Run one order; it may be the first to do so or a later one."""
        try:
            order = decode(delivery.data)
        except msgspec.MsgspecError as error:
            log.error("thrown out: not an order", extra={"subject": delivery.subject, "error": str(error)})
            return Outcome.DONE
        about(job=str(order.job_id), attempt=str(order.attempt))
        with in_hand.track_inprogress(), self.cancellations.watch(order.job_id) as cancelled:
            try:
                loaded = await self.studio.jobs.load(
                    order.user_id, order.job_id, order.submitted_seq, order.admitted_seq
                )
            except NotFound as error:  # looking again finds no more, and meanwhile it would hold a place
                gone = {"subject": delivery.subject, "error": error.detail}
                log.error("thrown out: an order for no job", extra=gone)
                return Outcome.DONE
            about(correlation=loaded.requested.correlation)
            parent = order.traceparent or loaded.requested.traceparent
            fields = {"forge.job": str(order.job_id), "forge.attempt": str(order.attempt)}
            with span("forge.job.run", parent, fields, kind=CONSUMER):
                return await Attempt(self.studio, order, loaded, delivery).run(cancelled)
