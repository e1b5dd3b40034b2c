"""What can be asked of forge, as acts on the log: load a boundary, decide, append, and again on a conflict.

:class:`Admissions` lets jobs in. :class:`Jobs` takes one job through its life. :class:`Assets` gives an asset
up. :class:`Uploads` takes one upload through its life. Nothing here knows Postgres, so requests are accepted
while it is down.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import msgspec

from forge.domain import uploads
from forge.domain.dispatch import Line
from forge.domain.ids import new_id
from forge.domain.jobs import Command, Job, Retry, admitted, decide, evolve
from forge.domain.limits import DEFAULT_PRIORITY
from forge.domain.uploads import Upload
from forge.errors import (
    Conflict,
    FieldError,
    Invalid,
    JobNotFailed,
    KeyReused,
    LogUnavailable,
    NotFound,
    QueueFull,
    UploadGone,
)
from forge.events.assets import AssetDeleted
from forge.events.catalogue import Event
from forge.events.envelope import Meta, Recorded, event_id
from forge.events.jobs import Admission, JobCancelled, JobRetried, JobStarted, JobSubmitted
from forge.events.uploads import UploadStored
from forge.eventstore import Draft, EventStore
from forge.telemetry import traceparent
from forge.topology import admissions, asset, uploads_of
from forge.topology import job as facts_of
from forge.topology import upload as facts_of_upload

SUBMIT_SECONDS = 0.8
"""How long a client waits for the log before it is told to come again."""

_TRIES = 20
_TURNS = 256

T = TypeVar("T")


class JobRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asks for, checked and complete.

    ``id`` is new, or stands for an Idempotency-Key (``keyed``); ``fingerprint`` tells whether a key came
    again with the same body. ``uploads`` are the pictures it uses, by the name of the field that names them.
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
    uploads: dict[str, UUID] = {}


class Loaded(msgspec.Struct, frozen=True):
    """A job as the log tells it: its state, its request, and the last sequence of its facts."""

    job: Job
    request: JobSubmitted
    requested: Meta
    seq: int
    facts: tuple[Recorded, ...] = ()


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
    ``moved``. Own admissions are taken in as soon as they are written.
    """

    def __init__(self, store: EventStore, line: Line, *, queue_limit: int) -> None:
        self.store, self.line, self.queue_limit = store, line, queue_limit
        self.jobs, self.uploads = Jobs(store), Uploads(store)
        self.caught_up = asyncio.Event()
        self.moved = asyncio.Condition()
        self._turns = [_Turn() for _ in range(_TURNS)]

    async def submit(self, user: str, requests: Sequence[JobRequest], *, actor: str) -> list[Loaded]:
        """Admit all requests or none; keys that were used before answer with their jobs as they are.

        Raises:
            KeyReused: a key was used with another body.
            Invalid: an upload is not there, or not the user's; names the field.
            QueueFull: too many jobs wait in all.
            LogUnavailable: the log gave no answer in time; repeat with the same Idempotency-Key.
        """

        async def attempt(seen: int) -> list[Loaded]:
            known = [await self._known(user, request) for request in requests]
            fresh = [request for request, job in zip(requests, known, strict=True) if job is None]
            if fresh and self.line.pending + len(fresh) > self.queue_limit:
                raise QueueFull(f"{self.line.pending} jobs wait already, and {self.queue_limit} may")
            await self.uploads.use(user, {f: id_ for r in fresh for f, id_ in r.uploads.items()}, actor=actor)
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
        drafts = [Draft(e, _meta(f"{e.job_id}/{command}", 0, actor, e.job_id)) for e in events]
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
        before: Sequence[Event] = (),
        within: float = 10.0,
    ) -> Loaded:
        """Decide and append, again on a conflict; ``before`` are events that hold only if this one does.

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
            try:
                records = await self._append(loaded, [*before, *events], actor, name, within)
            except Conflict:
                job = loaded.job
                loaded = await self.load(job.user_id, job.id, job.submitted_seq, job.admitted_seq)
                continue
            job = loaded.job
            for record in records[len(before) :]:
                job = evolve(job, record.event, record.meta.at)
            facts = (*loaded.facts, *records[len(before) :])
            return msgspec.structs.replace(loaded, job=job, seq=records[-1].seq, facts=facts)
        raise LogUnavailable(f"job {loaded.job.id} changes faster than can be decided")

    async def _append(
        self, loaded: Loaded, events: list[Event], actor: str, name: str, within: float
    ) -> list[Recorded]:
        job = loaded.job
        drafts = [
            Draft(e, _meta(f"{job.id}/{job.admitted_seq}/{name}", nth, actor, job.id))
            for nth, e in enumerate(events)
        ]
        drafts[-1] = msgspec.structs.replace(
            drafts[-1], boundary=facts_of(job.user_id, job.id), expected=loaded.seq
        )
        return await self.store.append(drafts, within=within)


# -------------------------------------------------------------------- assets


class Assets:
    """Gives assets up."""

    def __init__(self, store: EventStore) -> None:
        self.store = store

    async def delete(self, event: AssetDeleted, *, actor: str, within: float = 10.0) -> int:
        """Record that one reference is given up; the sequence of the event that says so."""
        filter_ = asset(event.character_id, event.asset_type, event.asset_id)
        for _ in range(_TRIES):
            boundary = await self.store.load(filter_, timeout=min(within, 2.0))
            meta = _meta(f"{event.asset_id}/{event.job_id}/delete/{boundary.seq}", 0, actor, event.job_id)
            try:
                [record] = await self.store.append([Draft(event, meta, filter_, boundary.seq)], within=within)
            except Conflict:
                continue
            return record.seq
        raise LogUnavailable(f"asset {event.asset_id} changes faster than can be decided")


# ------------------------------------------------------------------- uploads


class Uploads:
    """Takes one upload through its life."""

    def __init__(self, store: EventStore) -> None:
        self.store = store

    async def find(self, user: str, upload_id: UUID, *, timeout: float = 2.0) -> Upload:
        """The upload as the log tells it.

        Raises:
            UploadGone: the user has none of that id, or it expired.
            LogUnavailable: no answer.
        """
        known, _ = await self._load(user, upload_id, timeout)
        if known is None:
            raise UploadGone
        return known

    async def keep(self, stored: UploadStored, *, actor: str) -> tuple[Upload, int, bool]:
        """Record that a picture is on disk, or live on; the upload, its last event, and whether it is new."""
        before, upload, seq = await self._act(
            stored.user_id, stored.upload_id, lambda known: uploads.store(known, stored), "store", actor
        )
        assert upload is not None
        return upload, seq, before is None

    async def use(self, user: str, named: Mapping[str, UUID], *, actor: str) -> None:
        """Let the uploads live on that a request names, by field.

        Raises:
            Invalid: names the fields whose upload the user does not have.
            LogUnavailable: no answer.
        """
        gone: set[UUID] = set()
        for upload_id in set(named.values()):
            try:
                await self._act(
                    user, upload_id, lambda known: uploads.use(known, datetime.now(UTC)), "use", actor
                )
            except UploadGone:
                gone.add(upload_id)
        if gone:
            message = "you have no such upload; it may have expired"
            raise Invalid([FieldError(field, message) for field, id_ in named.items() if id_ in gone])

    async def expire(self, user: str, upload_id: UUID, now: datetime, *, actor: str) -> bool:
        """End an upload whose time is up; whether it was."""
        before, after, _ = await self._act(
            user, upload_id, lambda known: uploads.expire(known, now), "expire", actor, within=10.0
        )
        return before is not None and after is None

    async def referred(self, content_hash: str) -> bool:
        """Whether anybody's upload has this content, as the log tells it.

        Raises:
            LogUnavailable: no answer, or too many have had it for one.
        """
        facts = await self.store.load(uploads_of(content_hash))
        by_upload: dict[str, list[Event]] = {}
        for record in facts.events:
            by_upload.setdefault(record.subject.rpartition(".")[0], []).append(record.event)
        return any(uploads.fold(events) for events in by_upload.values())

    async def _load(self, user: str, upload_id: UUID, timeout: float) -> tuple[Upload | None, int]:
        facts = await self.store.load(facts_of_upload(user, upload_id), timeout=timeout)
        return uploads.fold(record.event for record in facts.events), facts.seq

    async def _act(
        self,
        user: str,
        upload_id: UUID,
        decide: Callable[[Upload | None], list[Event]],
        name: str,
        actor: str,
        within: float = SUBMIT_SECONDS,
    ) -> tuple[Upload | None, Upload | None, int]:
        """The upload before and after what was decided, and where its last event stands."""
        filter_, command = facts_of_upload(user, upload_id), f"{upload_id}/{name}/{new_id()}"
        for _ in range(_TRIES):
            known, seq = await self._load(user, upload_id, within)
            events = decide(known)
            if not events:
                return known, known, seq
            [event] = events
            meta = _meta(f"{command}/{seq}", 0, actor, upload_id)
            try:
                [record] = await self.store.append([Draft(event, meta, filter_, seq)], within=within)
            except Conflict:
                continue
            return known, uploads.fold([event], known), record.seq
        raise LogUnavailable(f"upload {upload_id} changes faster than can be decided")


def _meta(command: str, position: int, actor: str, about: UUID) -> Meta:
    return Meta(
        id=event_id(command, position),
        at=datetime.now(UTC),
        actor=actor,
        correlation=str(about),
        causation=command,
        traceparent=traceparent(),
    )
