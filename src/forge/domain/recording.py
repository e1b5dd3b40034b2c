"""What was asked of forge and what it took, out of the log: the material of a simulation. No I/O, no clock.

How long a prompt takes is read from the ends of attempts: at one backend they follow each other, so each took
from its start, or from the end before it where that came later, to its own end. Refused requests leave no
event and are not known.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Literal
from uuid import UUID

import msgspec

from forge.events.assets import AssetDeleted, AssetGivenUp, AssetPinned, AssetStored, AssetUnpinned
from forge.events.envelope import Recorded
from forge.events.jobs import (
    JobAttemptFailed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobRedirected,
    JobRetried,
    JobStarted,
    JobSubmitted,
)

ActKind = Literal["pin", "unpin", "delete"]

_AT_ONCE = timedelta(0)


class Tried(msgspec.Struct, frozen=True):
    """One attempt: what it took of a backend, None where it was stopped; the code of its failure, and
    whether trying again was of no use."""

    took: timedelta | None
    code: str = ""
    final: bool = False


class Act(msgspec.Struct, frozen=True):
    """What its owner did with a picture, so long after it was stored."""

    asset_id: UUID
    kind: ActKind
    after: timedelta


class Case(msgspec.Struct, kw_only=True):
    """One job as it went: what was asked and when, what each attempt took, what it brought."""

    asked: JobSubmitted
    at: datetime
    max_attempts: int
    tries: list[Tried] = []
    pictures: list[AssetStored] = []
    acts: list[Act] = []
    retried_after: list[timedelta] = []
    cancelled_at: datetime | None = None
    first_start: datetime | None = None
    ended_at: datetime | None = None
    outcome: Literal["", "completed", "cached", "failed", "cancelled"] = ""


class Stretch(msgspec.Struct, frozen=True):
    """Bytes of all pictures from a moment on."""

    at: datetime
    bytes: int


class Recording:
    """Feed it the log from its first event on with :meth:`apply`."""

    def __init__(self) -> None:
        self.cases: dict[UUID, Case] = {}
        self.records: list[Recorded] = []
        self.disk: list[Stretch] = []
        self.busy: list[tuple[datetime, timedelta]] = []
        self._at_work: dict[UUID, tuple[datetime, str]] = {}
        self._ended: dict[str, datetime] = {}
        self._stored_at: dict[tuple[UUID, UUID], datetime] = {}
        self._owners: dict[UUID, set[UUID]] = defaultdict(set)
        self._sizes: dict[UUID, int] = {}
        self._bytes = 0
        self._took: dict[str, list[timedelta]] = defaultdict(list)
        self._usual: dict[str, timedelta] = {}

    def apply(self, record: Recorded) -> None:
        """Take in one event of the log."""
        self.records.append(record)
        event, at = record.event, record.meta.at
        match event:
            case JobSubmitted():
                self.cases[event.job_id] = Case(asked=event, at=at, max_attempts=event.max_attempts)
            case AssetStored():
                self._store(event, at)
            case AssetGivenUp():
                self._give_up(event, at)
            case AssetPinned():
                self._act(event.asset_id, event.job_id, "pin", at)
            case AssetUnpinned():
                self._act(event.asset_id, event.job_id, "unpin", at)
            case (
                JobStarted()
                | JobRedirected()
                | JobRetried()
                | JobAttemptFailed()
                | JobFailed()
                | JobCompleted()
                | JobCancelled()
            ):
                case = self.cases.get(event.job_id)
                if case is not None:
                    self._job(case, event, at)
            case _:
                pass

    def usual(self, job_type: str) -> timedelta:
        """What a prompt of this type takes: the median of those that came to an end."""
        if job_type not in self._usual:
            took = self._took.get(job_type) or [t for some in self._took.values() for t in some]
            self._usual[job_type] = sorted(took)[(len(took) - 1) // 2] if took else _AT_ONCE
        return self._usual[job_type]

    def _job(
        self,
        case: Case,
        event: JobStarted
        | JobRedirected
        | JobRetried
        | JobAttemptFailed
        | JobFailed
        | JobCompleted
        | JobCancelled,
        at: datetime,
    ) -> None:
        match event:
            case JobStarted():
                self._at_work[event.job_id] = at, event.backend
                case.first_start = case.first_start or at
            case JobRedirected():
                started, _ = self._at_work.get(event.job_id, (at, ""))
                self._at_work[event.job_id] = started, event.backend
            case JobRetried():
                case.retried_after.append(at - (case.ended_at or at))
                case.outcome, case.ended_at, case.max_attempts = "", None, event.max_attempts
            case JobAttemptFailed():
                case.tries.append(Tried(self._end(event.job_id, at), event.code))
            case JobFailed():
                case.tries.append(
                    Tried(self._end(event.job_id, at), event.code, event.attempt < case.max_attempts)
                )
                case.outcome, case.ended_at = "failed", at
            case JobCompleted(cached=True):
                case.outcome, case.ended_at = "cached", at
            case JobCompleted():
                took = self._end(event.job_id, at)
                self._took[event.job_type].append(took)
                self._usual.clear()
                case.tries.append(Tried(took))
                case.outcome, case.ended_at = "completed", at
            case JobCancelled():
                if event.job_id in self._at_work:
                    self._end(event.job_id, at)
                    case.tries.append(Tried(None))
                case.outcome, case.ended_at, case.cancelled_at = "cancelled", at, at

    def _end(self, job_id: UUID, at: datetime) -> timedelta:
        started, backend = self._at_work.pop(job_id, (at, ""))
        took = max(_AT_ONCE, at - max(started, self._ended.get(backend, started)))
        self._ended[backend] = at
        self.busy.append((at, took))
        return took

    def _store(self, stored: AssetStored, at: datetime) -> None:
        case = self.cases.get(stored.job_id)
        if case is not None:
            case.pictures.append(stored)
        self._stored_at[stored.asset_id, stored.job_id] = at
        if not self._owners[stored.asset_id]:
            self._sizes[stored.asset_id] = stored.file_size_bytes
            self._bytes += stored.file_size_bytes
        self._owners[stored.asset_id].add(stored.job_id)
        self.disk.append(Stretch(at, self._bytes))

    def _give_up(self, gone: AssetGivenUp, at: datetime) -> None:
        if isinstance(gone, AssetDeleted) and gone.reason == "requested":
            self._act(gone.asset_id, gone.job_id, "delete", at)
        owners = self._owners[gone.asset_id]
        owners.discard(gone.job_id)
        if not owners:
            self._bytes -= self._sizes.pop(gone.asset_id, 0)
        self.disk.append(Stretch(at, self._bytes))

    def _act(self, asset_id: UUID, job_id: UUID, kind: ActKind, at: datetime) -> None:
        case, since = self.cases.get(job_id), self._stored_at.get((asset_id, job_id))
        if case is not None and since is not None:
            case.acts.append(Act(asset_id, kind, at - since))
