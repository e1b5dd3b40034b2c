"""What happens, as it happens: one reader of the whole log per API process.

It feeds the line that admissions are decided against and the ring of keys that the door looks at. It keeps
the last events in mind, so that a socket that was away can go on where it stopped. Progress of running jobs
comes over core NATS; only the latest counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from forge import chronicle
from forge.admissions import Admissions, AdmissionsState
from forge.api.backends import Backends
from forge.api.checkpoint import Checkpoint
from forge.api.happened import Happened
from forge.api.places import Places
from forge.broker import BrokerRefused, request
from forge.database import Pool
from forge.domain.keys import Keyring
from forge.errors import LogUnavailable
from forge.events.assets import AssetGivenUp, AssetPin, AssetReady, AssetStored
from forge.events.envelope import Recorded
from forge.events.jobs import JobAttemptFailed, JobCancelled, JobCompleted, JobFailed
from forge.snapshots import Snapshots
from forge.topology import ALL_KEYS, ALL_PROGRESS, BACKENDS, CHECKPOINT, EVENTS

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

log = logging.getLogger("forge.live")

REMEMBERED = 5000
"""Events that a socket may be behind before it must begin anew."""

_PROGRESS_KEPT = 1000
_CHANGES_KEPT = 1000
_ENDS_PROGRESS = (JobAttemptFailed, JobCompleted, JobFailed, JobCancelled)


class Told(msgspec.Struct):
    """One event as sockets get it; encoded when the first of them asks."""

    record: Recorded
    topic: str
    key: UUID
    user: str
    encoded: str = ""

    def text(self) -> str:
        if not self.encoded:
            record = self.record
            message = {
                "t": "ev",
                "seq": record.seq,
                "type": record.event.type,
                "key": self.key,
                "at": record.meta.at,
                "data": record.event,
            }
            if record.meta.traceparent:
                message["traceparent"] = record.meta.traceparent
            self.encoded = msgspec.json.encode(message).decode()
        return self.encoded


class Progress(msgspec.Struct, frozen=True):
    """The latest of one running job; ``tick`` tells newer from older."""

    tick: int
    user: str
    text: str


class _Heard(msgspec.Struct, frozen=True):
    """What workers publish about a running prompt."""

    job_id: UUID
    user_id: str
    value: float
    max: float
    attempt: int
    node: str | None = None


class _Moved(msgspec.Struct, frozen=True):
    """What projectors publish after a commit."""

    seq: int
    stream: str = EVENTS


class _Created(msgspec.Struct, frozen=True):
    created: datetime


_heard = msgspec.json.Decoder(_Heard)
_moved = msgspec.json.Decoder(_Moved)


class Live:
    """The log as it grows; run :meth:`run` beside the server and :meth:`close` before it stops.

    ``head`` is the last event that was read, ``floor`` the last one that is no longer remembered. Every
    ``snapshot_events`` a snapshot is taken of what admissions know.
    """

    def __init__(self, nc: Client, admissions: Admissions, pool: Pool, *, snapshot_events: int) -> None:
        self.nc, self.admissions = nc, admissions
        self.checkpoint = Checkpoint(pool)
        self.snapshots = Snapshots(pool, admissions.store, "admissions", AdmissionsState, snapshot_events)
        self.places = Places(admissions.line)
        self.backends = Backends()
        self.happened = Happened()
        self.keys = Keyring()
        self.epoch = ""
        self.head = 0
        self.written = 0
        self.floor = 0
        self._recalled = 0
        self.ticks = 0
        self.closing = False
        self.listeners: set[asyncio.Event] = set()
        self._recent: deque[Told] = deque()
        self._progress: OrderedDict[UUID, Progress] = OrderedDict()
        self._changed: OrderedDict[UUID, int] = OrderedDict()

    # ---------------------------------------------------------------- reading

    def since(self, position: int) -> list[Told]:
        """The remembered events behind a position, in order; all there are if ``position >= floor``."""
        newer: list[Told] = []
        for told in reversed(self._recent):
            if told.record.seq <= position:
                break
            newer.append(told)
        newer.reverse()
        return newer

    def progress(self, tick: int) -> Iterator[Progress]:
        """The latest progress of every running job that moved after ``tick``."""
        for latest in reversed(self._progress.values()):
            if latest.tick <= tick:
                return
            yield latest

    def wrote(self, seq: int, about: UUID | None = None) -> None:
        """This process has appended ``seq``, which it may not have read yet; ``about`` is what it changes."""
        self.written = max(self.written, seq)
        if about is not None:
            self._changed[about] = seq
            self._changed.move_to_end(about)
            if len(self._changed) > _CHANGES_KEPT:
                self._changed.popitem(last=False)

    def changed(self, about: UUID) -> int:
        """The last event by which this process changed it, as far as it remembers; 0 for none."""
        return self._changed.get(about, 0)

    @property
    def newest(self) -> int:
        """The last event this process knows of."""
        return max(self.head, self.written)

    # ---------------------------------------------------------------- feeding

    async def run(self) -> None:
        """Follow the log for ever.

        Raises:
            LogUnreadable: an event that this forge cannot decode; nothing behind it can be decided.
        """
        self.epoch = await self._epoch()
        subscriptions = [
            await self.nc.subscribe(ALL_PROGRESS, cb=self._on_progress),
            await self.nc.subscribe(CHECKPOINT, cb=self._on_checkpoint),
            await self.nc.subscribe(BACKENDS, cb=self.backends.hear),
        ]
        try:
            start = await self._recall()
            async with aclosing(chronicle.records(self.admissions.store, start)) as batches:
                async for batch in batches:
                    await self._take(batch.records)
                    if batch.caught_up:
                        self.admissions.caught_up.set()
                    if batch.records:
                        self._take_snapshot(batch.records[-1])
        finally:
            for subscription in subscriptions:
                if self.nc.is_connected:
                    await subscription.unsubscribe()

    def close(self) -> None:
        """Say goodbye to every socket; new ones are turned away."""
        self.closing = True
        self._wake()

    async def _recall(self) -> int:
        """Begin with the newest snapshot; the first event to read. Sockets may ask for some before it."""
        found = await self.snapshots.newest()
        if found is None:
            return 1
        self.admissions.restore(found.state)
        async with aclosing(chronicle.records(self.admissions.store, 1, (ALL_KEYS,))) as batches:
            async for batch in batches:
                for record in batch.records:
                    self.keys.apply(record)
                if batch.caught_up:
                    break
        self._recalled = found.seq
        self.floor = max(0, found.seq - REMEMBERED)
        return self.floor + 1

    def _take_snapshot(self, last: Recorded) -> None:
        # an admission of this process that was not read yet is behind the snapshot's end, and known already
        exact = self.admissions.line.last_admission <= last.seq
        if exact and self.admissions.caught_up.is_set() and self.snapshots.due(last.seq):
            self.snapshots.take(last.seq, str(last.meta.id), self.admissions.state())

    async def _take(self, records: list[Recorded]) -> None:
        if not records:
            return
        for record in records:
            if record.seq > self._recalled:
                self.admissions.apply(record)
            self.keys.apply(record)
            self._remember(record)
        self.head = records[-1].seq
        if self.admissions.caught_up.is_set():  # what was before this process is nobody's rate
            self.happened.count(records)
        async with self.admissions.moved:
            self.admissions.moved.notify_all()
        self._wake()

    def _remember(self, record: Recorded) -> None:
        told = _told(record)
        if told is None:
            return
        if len(self._recent) == REMEMBERED:
            self.floor = self._recent.popleft().record.seq
        self._recent.append(told)
        if isinstance(record.event, _ENDS_PROGRESS):
            self._progress.pop(told.key, None)

    def _wake(self) -> None:
        for listener in self.listeners:
            listener.set()

    async def _on_progress(self, message: Msg) -> None:
        try:
            heard = _heard.decode(message.data)
        except msgspec.DecodeError as error:
            log.warning("progress cannot be read", extra={"subject": message.subject, "reason": str(error)})
            return
        self.ticks += 1
        data = {"value": heard.value, "max": heard.max, "node": heard.node, "attempt": heard.attempt}
        live = {"t": "live", "key": heard.job_id, "kind": "progress", "data": data}
        self._progress[heard.job_id] = Progress(self.ticks, heard.user_id, msgspec.json.encode(live).decode())
        self._progress.move_to_end(heard.job_id)
        if len(self._progress) > _PROGRESS_KEPT:
            self._progress.popitem(last=False)
        self._wake()

    async def _on_checkpoint(self, message: Msg) -> None:
        try:
            moved = _moved.decode(message.data)
        except msgspec.DecodeError as error:
            log.warning("a checkpoint cannot be read", extra={"reason": str(error)})
            return
        if moved.stream == EVENTS:
            await self.checkpoint.reached(moved.seq)

    async def _epoch(self) -> str:
        """A name for this very log: sequences mean nothing in another one."""
        while True:
            try:
                info: Any = await request(self.nc, f"STREAM.INFO.{EVENTS}")
            except (LogUnavailable, BrokerRefused) as error:
                log.info("waiting for the log", extra={"reason": error.detail})
                await asyncio.sleep(0.2)
            else:
                created = msgspec.json.decode(info, type=_Created).created
                return f"{int(created.timestamp() * 1000):x}"


def _told(record: Recorded) -> Told | None:
    event = record.event
    user: str | None = getattr(event, "user_id", None)
    if user is None:
        return None
    if isinstance(event, AssetStored | AssetReady | AssetGivenUp | AssetPin):
        return Told(record, "assets", event.asset_id, user)
    job_id: UUID | None = getattr(event, "job_id", None)
    return None if job_id is None else Told(record, "jobs", job_id, user)
