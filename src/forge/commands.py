"""What can be asked of forge, as acts on the log: load a boundary, decide, append, and again on a conflict.

:class:`Admissions` lets jobs in. :class:`Jobs` takes one job through its life. Nothing here knows Postgres,
so requests are accepted while it is down.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import msgspec

from forge.domain.dispatch import Line
from forge.domain.ids import new_id
from forge.domain.jobs import Command, Job, Retry, admitted, decide, evolve
from forge.domain.limits import DEFAULT_PRIORITY
from forge.errors import Conflict, JobNotFailed, KeyReused, LogUnavailable, NotFound, QueueFull
from forge.events.catalogue import Event
from forge.events.envelope import Meta, Recorded, event_id
from forge.events.jobs import Admission, JobCancelled, JobRetried, JobStarted, JobSubmitted
from forge.eventstore import Draft, EventStore
from forge.telemetry import traceparent
from forge.topology import admissions
from forge.topology import job as facts_of

SUBMIT_SECONDS = 0.8
"""How long a client waits for the log before it is told to come again."""

_TRIES = 20
_TURNS = 256

T = TypeVar("T")


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for, checked and complete.

    ``id`` is new, or stands for an Idempotency-Key (``keyed``); ``fingerprint`` tells whether a key came
    again with the same body.
    """

    job_type: str
    asset_type: str
    params: dict[str, Any]
    workflow_version: str
    fingerprint: str
    id: UUID = msgspec.field(default_factory=new_id)
    keyed: bool = False
    priority: int = DEFAULT_PRIORITY
    session_id: str | None = None
    character_id: str | None = None
    ttl_seconds: int | None = None
    batch_id: UUID | None = None


class Loaded(msgspec.Struct, frozen=True):
    """A job as the log tells it: its state, its request, and the last sequence of its facts."""

    job: Job
    request: JobSubmitted
    requested: Meta
    seq: int
    facts: tuple[Recorded, ...] = ()


class Entry(msgspec.Struct, frozen=True):
    """An event to be written with others, and the boundary whose newest event it expects, if any."""

    event: Event
    boundary: str | None = None
    expected: int = 0


async def no_entries() -> list[Entry]:
    """For a decision that stands alone."""
    return []


async def unguarded() -> None:
    """For those who have room for anything."""


def fingerprint(body: Any) -> str:
    """A hash of a request's body that does not depend on the order of its keys."""
    return hashlib.sha256(msgspec.json.encode(body, order="deterministic")).hexdigest()


# ----------------------------------------------------------------- admission


class _Turn:
    """Who decides next; when the log gave no answer, those who wait behind are told at once."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.unanswered_at = 0.0


class Admissions:
    """Admits jobs, exactly: decides against the line, and the log refuses a decision that is out of date.

    ``line`` is fed by whoever follows the log, from its first event on, who sets ``caught_up`` and notifies
    ``moved``. Own admissions are taken in as soon as they are written. ``guard`` is asked before anything new
    is admitted, and raises where the pictures would find no room.
    """

    def __init__(
        self,
        store: EventStore,
        line: Line,
        *,
        queue_limit: int,
        guard: Callable[[], Awaitable[None]] = unguarded,
    ) -> None:
        self.store, self.line, self.queue_limit, self.guard = store, line, queue_limit, guard
        self.jobs = Jobs(store)
        self.caught_up = asyncio.Event()
        self.moved = asyncio.Condition()
        self._turns = [_Turn() for _ in range(_TURNS)]

    async def submit(self, user: str, requests: Sequence[JobRequest], *, actor: str) -> list[Loaded]:
        """Admit all requests or none; keys that were used before answer with their jobs as they are.

        Raises:
            KeyReused: a key was used with another body.
            QueueFull: too many jobs wait in all.
            DiskFull: what they bring could not be stored (or whatever else ``guard`` raises).
            LogUnavailable: the log gave no answer in time; repeat with the same Idempotency-Key.
        """

        async def attempt(seen: int) -> list[Loaded]:
            known = [await self._known(user, request) for request in requests]
            fresh = [request for request, job in zip(requests, known, strict=True) if job is None]
            if fresh:
                await self.guard()
            if fresh and self.line.pending + len(fresh) > self.queue_limit:
                raise QueueFull(f"{self.line.pending} jobs wait already, and {self.queue_limit} may")
            made = iter(await self._admit(user, seen, [_submission(user, r) for r in fresh], "submit", actor))
            return [job or _fresh(next(made)) for job in known]

        return await self._in_turn(user, attempt)

    async def retry(self, user: str, job_id: UUID, submitted_seq: int, *, actor: str) -> Loaded:
        """Admit a failed job again; ``submitted_seq`` is where its request stands.

        Raises:
            JobNotFailed: it has not failed, or was retried already.
            LogUnavailable: as for :meth:`submit`.
        """

        async def attempt(seen: int) -> Loaded:
            waiting = self.line.jobs.get(job_id)
            if waiting is not None:
                raise JobNotFailed(f"the job is {waiting.status}; only a failed job can be retried")
            loaded = await self.jobs.load(user, job_id, submitted_seq, timeout=SUBMIT_SECONDS)
            [event] = decide(Retry(), loaded.job)
            await self.guard()
            assert isinstance(event, JobRetried)
            [record] = await self._admit(user, seen, [event], f"retry/{loaded.job.attempt}", actor)
            job = admitted(event, record.seq, record.meta.at)
            return msgspec.structs.replace(loaded, job=job, seq=record.seq)

        return await self._in_turn(user, attempt)

    async def _admit(
        self, user: str, seen: int, events: Sequence[Admission], command: str, actor: str
    ) -> list[Recorded]:
        if not events:
            return []
        drafts = [Draft(e, meta(f"{e.job_id}/{command}", 0, actor, e.job_id)) for e in events]
        drafts[0] = msgspec.structs.replace(drafts[0], boundary=admissions(user), expected=seen)
        records = await self.store.append(drafts, within=SUBMIT_SECONDS)
        for record in records:
            self.line.apply(record)
        return records

    async def _in_turn(self, user: str, attempt: Callable[[int], Awaitable[T]]) -> T:
        """One decision of a user at a time in this process: conflicts then come from other processes only.

        ``attempt`` is told where the user's ledger ended before it looked at anything.
        """
        if not self.caught_up.is_set():
            await _within(self.caught_up.wait(), "forge is still reading its log")
        turn, asked_at = self._turns[hash(user) % _TURNS], time.monotonic()
        async with turn.lock:
            if turn.unanswered_at > asked_at:
                raise LogUnavailable("the log gave no answer to whoever asked before")
            try:
                return await self._decided(user, attempt)
            except LogUnavailable:
                turn.unanswered_at = time.monotonic()
                raise

    async def _decided(self, user: str, attempt: Callable[[int], Awaitable[T]]) -> T:
        for _ in range(_TRIES):
            seen = self.line.admission_seq.get(user, 0)
            try:
                return await attempt(seen)
            except Conflict:
                await self._catch_up(user, seen)
        raise LogUnavailable(f"{user}'s requests come faster than they can be decided")

    async def _catch_up(self, user: str, seen: int) -> None:
        def newer() -> bool:
            return self.line.admission_seq.get(user, 0) > seen

        async with self.moved:
            await _within(self.moved.wait_for(newer), "forge does not hear from its log")

    async def _known(self, user: str, request: JobRequest) -> Loaded | None:
        """The job a key stands for, if it was used: one that waits or runs is in the line, one that is over
        has facts. Without a key only one's own request whose answer was lost can be known."""
        waiting = self.line.jobs.get(request.id)
        if waiting is None and not request.keyed:
            return None
        patience = SUBMIT_SECONDS
        if waiting is not None:
            seq: int | None = waiting.submitted_seq
        else:
            seq = await self.jobs.submitted_seq(user, request.id, timeout=patience)
        if seq is None:
            return None
        loaded = await self.jobs.load(user, request.id, seq, timeout=patience)
        if loaded.request.fingerprint != request.fingerprint:
            raise KeyReused
        return loaded


async def _within(awaitable: Awaitable[Any], otherwise: str) -> None:
    try:
        await asyncio.wait_for(awaitable, SUBMIT_SECONDS)
    except TimeoutError:
        raise LogUnavailable(otherwise) from None


def _submission(user: str, request: JobRequest) -> JobSubmitted:
    return JobSubmitted(
        job_id=request.id,
        user_id=user,
        job_type=request.job_type,
        asset_type=request.asset_type,
        params=request.params,
        workflow_version=request.workflow_version,
        priority=request.priority,
        fingerprint=request.fingerprint,
        session_id=request.session_id,
        character_id=request.character_id,
        batch_id=request.batch_id,
        ttl_seconds=request.ttl_seconds,
    )


def _fresh(record: Recorded) -> Loaded:
    assert isinstance(record.event, JobSubmitted)
    job = admitted(record.event, record.seq, record.meta.at)
    return Loaded(job, record.event, record.meta, record.seq)


# ---------------------------------------------------------------- one job


class Jobs:
    """Takes one job through its life."""

    def __init__(self, store: EventStore) -> None:
        self.store = store

    async def load(
        self, user: str, job_id: UUID, submitted_seq: int, admitted_seq: int = 0, *, timeout: float = 2.0
    ) -> Loaded:
        """The job as the log tells it; ``admitted_seq`` where it was admitted last, if that was by a retry.

        Raises:
            NotFound: no request of that job stands there.
            LogUnavailable: no answer.
        """
        request, facts = await asyncio.gather(
            self.store.at(submitted_seq, timeout=timeout),
            self.store.load(facts_of(user, job_id), timeout=timeout),
        )
        if request is None or not isinstance(request.event, JobSubmitted) or request.event.job_id != job_id:
            raise NotFound(f"there is no job {job_id}")
        retried = admitted_seq not in (0, submitted_seq)
        last = await self.store.at(admitted_seq, timeout=timeout) if retried else request
        if last is None or not isinstance(last.event, JobSubmitted | JobRetried):
            raise NotFound(f"job {job_id} was not admitted at {admitted_seq}")
        job = admitted(last.event, last.seq, last.meta.at)
        for fact in facts.events:
            if fact.seq > last.seq:
                job = evolve(job, fact.event, fact.meta.at)
        return Loaded(job, request.event, request.meta, facts.seq, tuple(facts.events))

    async def submitted_seq(self, user: str, job_id: UUID, *, timeout: float = 2.0) -> int | None:
        """Where the request of a job that has facts stands."""
        facts = await self.store.load(facts_of(user, job_id), timeout=timeout)
        found = (
            r.event.submitted_seq for r in facts.events if isinstance(r.event, JobStarted | JobCancelled)
        )
        return next(found, None)

    async def act(
        self,
        loaded: Loaded,
        command: Command,
        *,
        actor: str,
        name: str,
        before: Callable[[], Awaitable[Sequence[Entry]]] = no_entries,
        within: float = 10.0,
    ) -> Loaded:
        """Decide and append, again on a conflict; ``before`` makes the entries that hold only if it does.

        ``name`` names the command within the job, and who says it where that matters (``2/start/worker-a``):
        the same name is the same act, and saying it twice does it once.

        Raises:
            ForgeError: what the decision says, see :func:`forge.domain.jobs.decide`.
            LogUnavailable: whether it is done is unknown.
        """
        for _ in range(_TRIES):
            events = decide(command, loaded.job)
            if not events:
                return loaded
            entries = [*await before(), *map(Entry, events)]
            try:
                records = await self._append(loaded, entries, actor, name, within)
            except Conflict:
                job = loaded.job
                loaded = await self.load(job.user_id, job.id, job.submitted_seq, job.admitted_seq)
                continue
            job, mine = loaded.job, records[-len(events) :]
            for record in mine:
                job = evolve(job, record.event, record.meta.at)
            facts = (*loaded.facts, *mine)
            return msgspec.structs.replace(loaded, job=job, seq=records[-1].seq, facts=facts)
        raise LogUnavailable(f"job {loaded.job.id} changes faster than can be decided")

    async def _append(
        self, loaded: Loaded, entries: Sequence[Entry], actor: str, name: str, within: float
    ) -> list[Recorded]:
        job = loaded.job
        drafts = [
            Draft(
                e.event,
                meta(f"{job.id}/{job.admitted_seq}/{name}", nth, actor, job.id),
                e.boundary,
                e.expected,
            )
            for nth, e in enumerate(entries)
        ]
        drafts[-1] = msgspec.structs.replace(
            drafts[-1], boundary=facts_of(job.user_id, job.id), expected=loaded.seq
        )
        return await self.store.append(drafts, within=within)


def meta(command: str, position: int, actor: str, job_id: UUID) -> Meta:
    """The envelope of the ``position``-th event of a command about a job, now."""
    return Meta(
        id=event_id(command, position),
        at=datetime.now(UTC),
        actor=actor,
        correlation=str(job_id),
        causation=command,
        traceparent=traceparent(),
    )
