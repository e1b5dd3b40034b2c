"""The life of a job: commands, state, `decide` and `evolve`. No I/O, no clock: time is part of a command.

::

    pending ──start──▶ running ──complete──▶ completed   (reuse: pending ──▶ completed)
       ▲  ╲               │ ╲────fail──────▶ failed ──retry──▶ pending
       │   ╲──cancel──▶ cancelled ◀──cancel──┘
       └───────── attempt failed
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import StrEnum
from typing import assert_never
from uuid import UUID

import msgspec

from forge.domain.limits import BACKOFF_SECONDS, MAX_ADOPTIONS, MAX_ATTEMPTS, MAX_REDIRECTIONS
from forge.errors import JobAlreadyOver, JobNotFailed, StaleAttempt
from forge.events.catalogue import Event
from forge.events.jobs import (
    JobAdopted,
    JobAttemptFailed,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobRedirected,
    JobRetried,
    JobStarted,
    JobSubmitted,
    Produced,
    Regenerated,
)


class Status(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED, Status.CANCELLED)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What decisions about one job need to know."""

    id: UUID
    user_id: str
    job_type: str
    submitted_seq: int
    admitted_seq: int
    priority: int
    admitted_at: datetime
    max_attempts: int = MAX_ATTEMPTS
    asset_type: str = ""
    session_id: str | None = None
    character_id: str | None = None
    recipe: str = ""
    pictures: int = 1
    status: Status = Status.PENDING
    attempt: int = 0
    adoption: int = 0
    redirection: int = 0
    worker: str = ""
    backend: str = ""
    started_at: datetime | None = None
    retry_at: datetime | None = None


# ------------------------------------------------------------------ commands


class Start(msgspec.Struct, frozen=True):
    """Begin an attempt."""

    attempt: int
    worker: str
    backend: str
    reason: str


class Adopt(msgspec.Struct, frozen=True):
    """Take over an attempt whose worker is gone."""

    attempt: int
    worker: str


class Redirect(msgspec.Struct, frozen=True):
    """Take an attempt of which nothing was sent to another backend."""

    attempt: int
    worker: str
    backend: str
    reason: str


class Complete(msgspec.Struct, frozen=True):
    """Conclude an attempt with its pictures; ``followed``: they are what the job's recipe gives."""

    attempt: int
    worker: str
    assets: tuple[Produced, ...]
    now: datetime
    regenerated: Regenerated | None = None
    followed: bool = True


class Reuse(msgspec.Struct, frozen=True):
    """Conclude a waiting job with pictures that were drawn before."""

    assets: tuple[Produced, ...]
    now: datetime
    regenerated: Regenerated | None = None


class FailAttempt(msgspec.Struct, frozen=True):
    """Conclude an attempt without a result; ``final`` when trying again cannot help."""

    attempt: int
    code: str
    message: str
    final: bool
    now: datetime


class Cancel(msgspec.Struct, frozen=True):
    """Stop the job wherever it is."""


class Retry(msgspec.Struct, frozen=True):
    """Ask for a failed job again."""


Command = Start | Adopt | Redirect | Complete | Reuse | FailAttempt | Cancel | Retry


def decide(command: Command, job: Job) -> list[Event]:
    """The events that follow from a command, none when it was already done.

    Raises:
        StaleAttempt: the command speaks for an attempt, or a worker, that is no longer current.
        JobAlreadyOver, JobNotFailed: what they say.
    """
    match command:
        case Start():
            return _start(command, job)
        case Adopt():
            return _adopt(command, job)
        case Redirect():
            return _redirect(command, job)
        case Complete():
            return _complete(command, job)
        case Reuse():
            return _reuse(command, job)
        case FailAttempt():
            return _fail_attempt(command, job)
        case Cancel():
            return _cancel(job)
        case Retry():
            return _retry(job)
        case _:  # pragma: no cover  # the type checker shows it
            assert_never(command)


def _start(command: Start, job: Job) -> list[Event]:
    if job.status is not Status.PENDING or command.attempt != job.attempt + 1:
        raise StaleAttempt
    return [
        JobStarted(
            job_id=job.id,
            user_id=job.user_id,
            job_type=job.job_type,
            attempt=command.attempt,
            worker=command.worker,
            backend=command.backend,
            reason=command.reason,
            submitted_seq=job.submitted_seq,
        )
    ]


def _adopt(command: Adopt, job: Job) -> list[Event]:
    _require_current(job, command.attempt)
    return [
        JobAdopted(
            job_id=job.id,
            user_id=job.user_id,
            attempt=job.attempt,
            adoption=job.adoption + 1,
            worker=command.worker,
        )
    ]


def _redirect(command: Redirect, job: Job) -> list[Event]:
    _require_own(job, command.attempt, command.worker)
    return [
        JobRedirected(
            job_id=job.id,
            user_id=job.user_id,
            attempt=job.attempt,
            redirection=job.redirection + 1,
            worker=command.worker,
            backend=command.backend,
            reason=command.reason,
        )
    ]


def _complete(command: Complete, job: Job) -> list[Event]:
    _require_own(job, command.attempt, command.worker)
    started = job.started_at or command.now
    return [
        JobCompleted(
            job_id=job.id,
            user_id=job.user_id,
            job_type=job.job_type,
            attempt=job.attempt,
            assets=list(command.assets),
            waited_ms=_milliseconds(started - job.admitted_at),
            run_ms=_milliseconds(command.now - started),
            recipe=job.recipe if command.followed else "",
            submitted_seq=job.submitted_seq,
            regenerated=command.regenerated,
        )
    ]


def _reuse(command: Reuse, job: Job) -> list[Event]:
    if job.status is not Status.PENDING:
        raise StaleAttempt(f"the job is {job.status}")
    return [
        JobCompleted(
            job_id=job.id,
            user_id=job.user_id,
            job_type=job.job_type,
            attempt=job.attempt,
            assets=list(command.assets),
            waited_ms=_milliseconds(command.now - job.admitted_at),
            run_ms=0,
            cached=True,
            recipe=job.recipe,
            submitted_seq=job.submitted_seq,
            regenerated=command.regenerated,
        )
    ]


def _fail_attempt(command: FailAttempt, job: Job) -> list[Event]:
    _require_current(job, command.attempt)
    if command.final or job.attempt >= job.max_attempts:
        return [
            JobFailed(
                job_id=job.id,
                user_id=job.user_id,
                job_type=job.job_type,
                attempt=job.attempt,
                code=command.code,
                message=command.message,
            )
        ]
    return [
        JobAttemptFailed(
            job_id=job.id,
            user_id=job.user_id,
            attempt=job.attempt,
            code=command.code,
            message=command.message,
            retry_at=command.now + timedelta(seconds=backoff(job.attempt)),
        )
    ]


def _cancel(job: Job) -> list[Event]:
    if job.status is Status.CANCELLED:
        return []  # said twice, done once
    if job.status.over:
        raise JobAlreadyOver(f"the job is {job.status}")
    return [
        JobCancelled(
            job_id=job.id,
            user_id=job.user_id,
            job_type=job.job_type,
            attempt=job.attempt,
            submitted_seq=job.submitted_seq,
        )
    ]


def _retry(job: Job) -> list[Event]:
    if job.status is not Status.FAILED:
        raise JobNotFailed(f"the job is {job.status}; only a failed job can be retried")
    return [
        JobRetried(
            job_id=job.id,
            user_id=job.user_id,
            job_type=job.job_type,
            priority=job.priority,
            submitted_seq=job.submitted_seq,
            attempt=job.attempt,
            max_attempts=job.attempt + MAX_ATTEMPTS,
            asset_type=job.asset_type,
            session_id=job.session_id,
            character_id=job.character_id,
            recipe=job.recipe,
            pictures=job.pictures,
        )
    ]


def _require_current(job: Job, attempt: int) -> None:
    if job.status is not Status.RUNNING or attempt != job.attempt:
        raise StaleAttempt(
            f"attempt {attempt} is not current: the job is {job.status}, attempt {job.attempt}"
        )


def _require_own(job: Job, attempt: int, worker: str) -> None:
    _require_current(job, attempt)
    if worker != job.worker:
        raise StaleAttempt(f"attempt {job.attempt} was adopted by {job.worker}")


def exhausted(job: Job) -> bool:
    """Whether too many workers were lost on the current attempt."""
    return job.adoption >= MAX_ADOPTIONS


def suspect(job: Job) -> bool:
    """Whether the job itself may be what ends workers: one that had taken its attempt over is lost, too."""
    return job.status is Status.RUNNING and job.adoption > 0


def stranded(job: Job) -> bool:
    """Whether the current attempt went from one backend to the next too often to go on."""
    return job.redirection >= MAX_REDIRECTIONS


def held_at(facts: Iterable[Event], attempt: int) -> str | None:
    """The backend where a job's attempt is under way, from the job's facts in order; None if it is not.

    Only an attempt that is under way has anything to look for at a backend.
    """
    backend: str | None = None
    for fact in facts:
        match fact:
            case JobStarted() | JobRedirected():
                backend = fact.backend if fact.attempt == attempt else None
            case JobAttemptFailed() | JobCompleted() | JobFailed() | JobCancelled():
                backend = None
            case _:
                pass
    return backend


def sent_to(facts: Iterable[Event], attempt: int) -> str:
    """The backend that a job's attempt was last meant for, whatever became of it; empty before its start."""
    backends = [
        f.backend for f in facts if isinstance(f, JobStarted | JobRedirected) and f.attempt == attempt
    ]
    return backends[-1] if backends else ""


def backoff(attempt: int) -> float:
    """Seconds to wait after this attempt failed."""
    return BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS)) - 1]


def _milliseconds(span: timedelta) -> int:
    return max(0, round(span / timedelta(milliseconds=1)))


# --------------------------------------------------------------------- state


def admitted(event: JobSubmitted | JobRetried, seq: int, at: datetime) -> Job:
    """The job as its request made it, or as a retry made it anew."""
    again = event.attempt if isinstance(event, JobRetried) else 0
    return Job(
        id=event.job_id,
        user_id=event.user_id,
        job_type=event.job_type,
        submitted_seq=event.submitted_seq if isinstance(event, JobRetried) else seq,
        admitted_seq=seq,
        priority=event.priority,
        admitted_at=at,
        attempt=again,
        max_attempts=event.max_attempts,
        asset_type=event.asset_type,
        session_id=event.session_id,
        character_id=event.character_id,
        recipe=event.recipe,
        pictures=event.pictures,
    )


def evolve(job: Job, event: Event, at: datetime) -> Job:
    """The job after one of its facts."""
    change = msgspec.structs.replace
    match event:
        case JobStarted():
            return change(
                job,
                status=Status.RUNNING,
                attempt=event.attempt,
                adoption=0,
                redirection=0,
                worker=event.worker,
                backend=event.backend,
                started_at=at,
                retry_at=None,
            )
        case JobAdopted():
            return change(job, adoption=event.adoption, worker=event.worker)
        case JobRedirected():
            return change(job, redirection=event.redirection, backend=event.backend)
        case JobAttemptFailed():
            return change(job, status=Status.PENDING, retry_at=event.retry_at)
        case JobCompleted():
            return change(job, status=Status.COMPLETED)
        case JobFailed():
            return change(job, status=Status.FAILED)
        case JobCancelled():
            return change(job, status=Status.CANCELLED)
        case _:
            return job
