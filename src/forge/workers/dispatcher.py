"""The dispatcher: keeps the waiting jobs in order and gives the next one whenever a place is free.

It gives just in time, so that priority, cancellation and fairness hold until the last moment. The stream of
orders takes no more than three (``nats/streams.json``), whatever this code believes: with two dispatchers, or
one that has just restarted, an order is simply refused. An order that ought to be there and is not, because a
server lost it or a worker dropped it, is given again; a worker that gets it looks before it draws.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from uuid import UUID

import msgspec
from nats.aio.msg import Msg

from forge import chronicle
from forge.broker import BrokerRefused, exchange, request
from forge.domain.dispatch import Choice, Line, LineState
from forge.domain.jobs import Job, Status
from forge.domain.results import Results
from forge.errors import LogUnavailable
from forge.events.envelope import Recorded
from forge.events.jobs import Admission
from forge.eventstore import EventStore
from forge.snapshots import Snapshots
from forge.telemetry import PRODUCER, span, traceparent
from forge.topology import ALL_ADMISSIONS, ALL_JOB_FACTS, DISPATCH, ORDER_DONE
from forge.topology import order as order_subject
from forge.workers import numbers
from forge.workers.orders import Order, encode

log = logging.getLogger("forge.dispatcher")

_FULL = 10077
_LOOK_SECONDS = 1.0
_MISSING_SECONDS = 3.0
"""An order that is missed for so long is given again; until then the log may just not have told yet."""


class _Stream(msgspec.Struct):
    class Config(msgspec.Struct):
        max_msgs: int

    class State(msgspec.Struct):
        subjects: dict[str, int] | None = None

    config: Config
    state: State


class _PubAck(msgspec.Struct):
    class Error(msgspec.Struct):
        err_code: int = 0
        description: str = ""

    seq: int = 0
    duplicate: bool = False
    error: Error | None = None


class _Done(msgspec.Struct):
    stream_seq: int


def _job_of(subject: str) -> UUID | None:
    """The job an order is for; None for a stranger in the queue, which a worker will throw out."""
    try:
        return UUID(subject.rpartition(".")[2])
    except ValueError:
        return None


class DispatcherState(msgspec.Struct, frozen=True):
    """All that a dispatcher knows at one event of the log."""

    line: LineState
    results: dict[str, int]
    traces: dict[UUID, str]


class Dispatcher:
    """One role of a worker process; several may run, and give no job twice."""

    def __init__(self, store: EventStore, snapshots: Snapshots[DispatcherState] | None = None) -> None:
        self.store, self.nc, self.snapshots = store, store.nc, snapshots
        self.line = Line()
        self.results = Results()
        self.places = 0
        self.orders: dict[UUID, int] = {}
        """Jobs whose order lies in the queue → its sequence there, 0 where another dispatcher gave it."""
        self._news = asyncio.Event()
        self._missed: dict[UUID, float] = {}
        self._traces: dict[UUID, str] = {}
        """The traces of jobs that are not over, of those that have one."""

    async def run(self) -> None:
        """Dispatch for ever."""
        caught_up = asyncio.Event()
        subscription = await self.nc.subscribe(ORDER_DONE, cb=self._on_done)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(caught_up), name="dispatcher follows the log")
                await caught_up.wait()
                await self._dispatch()
        finally:
            if self.nc.is_connected:
                await subscription.unsubscribe()

    async def _follow(self, caught_up: asyncio.Event) -> None:
        start, followed = await self._recall(), (ALL_ADMISSIONS, ALL_JOB_FACTS)
        async with aclosing(chronicle.records(self.store, start, followed)) as batches:
            async for batch in batches:
                for record in batch.records:
                    self.line.apply(record)
                    self.results.apply(record)
                    if record.meta.traceparent or self._traces:
                        self._follow_trace(record)
                self._news.set()
                if batch.caught_up:
                    caught_up.set()
                if batch.records and caught_up.is_set():
                    self._take_snapshot(batch.records[-1])

    async def _recall(self) -> int:
        """Begin with the newest snapshot; the first event to read."""
        found = None if self.snapshots is None else await self.snapshots.newest()
        if found is None:
            return 1
        self.line.restore(found.state.line)
        self.results.restore(found.state.results)
        self._traces = found.state.traces
        return found.seq + 1

    def _take_snapshot(self, last: Recorded) -> None:
        if self.snapshots is not None and self.snapshots.due(last.seq):
            state = DispatcherState(self.line.state(), self.results.state(), self._traces)
            self.snapshots.take(last.seq, str(last.meta.id), state)

    def _follow_trace(self, record: Recorded) -> None:
        job_id: UUID = getattr(record.event, "job_id")  # noqa: B009  (every event it follows has one)
        if job_id not in self.line.jobs:
            self._traces.pop(job_id, None)
        elif isinstance(record.event, Admission) and record.meta.traceparent:
            self._traces[job_id] = record.meta.traceparent

    async def _dispatch(self) -> None:
        looked = 0.0
        while True:
            self._news.clear()
            due = self.line.release(datetime.now(UTC))
            try:
                if time.monotonic() - looked > _LOOK_SECONDS:
                    await self._look()
                    looked = time.monotonic()
                await self._fill()
                numbers.places.set(self.places)
                numbers.places_taken.set(self._taken())
            except (LogUnavailable, BrokerRefused) as error:
                log.warning("dispatching is interrupted", extra={"error": str(error)})
            pause = _LOOK_SECONDS
            if due is not None:
                pause = min(pause, max(0.01, (due - datetime.now(UTC)).total_seconds()))
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._news.wait()

    async def _fill(self) -> None:
        """Give orders while a place is free and somebody waits."""
        while self._taken() < self.places:
            choice = self.line.choose(self._given())
            if choice is None or not await self._give(choice, f"{choice.job.id}-{choice.job.attempt + 1}"):
                return

    def _taken(self) -> int:
        """Places in use: one for each order, and one for each job that runs although its order is gone."""
        jobs = self.line.jobs
        running = len(jobs) - self.line.pending
        with_order = sum(id_ in jobs and jobs[id_].status is Status.RUNNING for id_ in self.orders)
        return len(self.orders) + running - with_order

    def _given(self) -> list[UUID]:
        """Jobs whose order is out but whose start the log does not tell yet."""
        jobs = self.line.jobs
        return [id_ for id_ in self.orders if id_ in jobs and jobs[id_].status is Status.PENDING]

    async def _give(self, choice: Choice, message_id: str) -> bool:
        fields = {"forge.job": str(choice.job.id), "forge.reason": choice.reason}
        with span("forge.order", self._traces.get(choice.job.id, ""), fields, kind=PRODUCER):
            return await self._publish(choice, message_id)

    async def _publish(self, choice: Choice, message_id: str) -> bool:
        job = choice.job
        order = Order(
            job_id=job.id,
            user_id=job.user_id,
            attempt=job.attempt if job.status is Status.RUNNING else job.attempt + 1,
            submitted_seq=job.submitted_seq,
            admitted_seq=job.admitted_seq,
            reason=choice.reason,
            drawn_at=self.results.find(job.recipe) or 0,
            traceparent=traceparent(),
        )
        headers = {"Nats-Msg-Id": message_id}
        answer = await exchange(self.nc, order_subject(job.id), encode(order), headers, 2.0)
        ack = msgspec.json.decode(answer, type=_PubAck)
        if ack.error is not None and ack.error.err_code != _FULL:
            raise BrokerRefused(ack.error.err_code, ack.error.description)
        if ack.error is not None:
            await self._look()
            return False
        numbers.orders.inc()
        # an order that was given before and is gone counts as there until looking proves that it is missed
        self.orders[job.id] = ack.seq
        return True

    async def _look(self) -> None:
        """Read which orders really lie in the queue, and give again those that ought to and do not."""
        info = msgspec.json.decode(
            await request(self.nc, f"STREAM.INFO.{DISPATCH}", {"subjects_filter": ">"}), type=_Stream
        )
        self.places = info.config.max_msgs
        there = {id_ for subject in info.state.subjects or {} if (id_ := _job_of(subject)) is not None}
        lost = [job for job in self._expected() if job.id not in there]
        # in the order they were given, as far as that is known
        self.orders = {id_: self.orders.get(id_, 0) for id_ in [*self.orders, *there] if id_ in there}
        now = time.monotonic()
        self._missed = {job.id: self._missed.get(job.id, now) for job in lost}
        for job in lost:
            since = self._missed[job.id]
            if now - since > _MISSING_SECONDS and len(self.orders) < self.places:
                numbers.orders_lost.inc()
                log.warning("an order is missing", extra={"job": str(job.id), "attempt": job.attempt})
                await self._give(Choice(job, "its order was lost"), f"{job.id}-{job.attempt}-again-{now:.3f}")

    def _expected(self) -> list[Job]:
        """Jobs that run, or were given: their order should be in the queue."""
        given = (self.line.jobs[id_] for id_ in self._given())
        return [*self.line.running(), *given]

    async def _on_done(self, message: Msg) -> None:
        """A worker has acked: its place is free. Wakes up sooner than the next look would."""
        seq = msgspec.json.decode(message.data, type=_Done).stream_seq
        self.orders = {id_: at for id_, at in self.orders.items() if at != seq}
        self._news.set()
