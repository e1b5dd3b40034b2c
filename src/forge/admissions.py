"""Lets jobs in: within the limits, exactly, with any number of processes that do so.

Nothing here knows Postgres, so requests are accepted while it is down.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import msgspec

from forge.commands import SUBMIT_SECONDS, Jobs, Loaded
from forge.domain.admission import (
    Balances,
    BalancesState,
    Grants,
    GrantsState,
    Sizes,
    demand_character,
    demand_hour,
    demand_places,
    demand_queue,
    demand_session,
)
from forge.domain.assets import answers, produced, regenerated
from forge.domain.dispatch import Line, LineState
from forge.domain.ids import new_id
from forge.domain.jobs import Job, Retry, Reuse, admitted, decide, evolve
from forge.domain.limits import DEFAULT_PRIORITY, MAX_QUEUED_JOBS
from forge.domain.results import Results
from forge.errors import (
    Conflict,
    ForgeError,
    KeyReused,
    Limit,
    LimitReached,
    LogUnavailable,
    QueueFull,
)
from forge.events.envelope import Recorded
from forge.events.jobs import Admission, JobRetried, JobSubmitted, Original
from forge.eventstore import Entry, EventStore, drafts_of
from forge.library import Library, Shelf
from forge.topology import ALL_ADMISSIONS, admissions
from forge.topology import job as facts_of
from forge.uploads import Uploads

log = logging.getLogger("forge.admissions")

_TRIES = 20
_TURNS = 256

_PROCESSES = 16
"""API processes up to which the bound of the queue of all is exact."""

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
    recipe: str = ""
    pictures: int = 1
    id: UUID = msgspec.field(default_factory=new_id)
    keyed: bool = False
    priority: int = DEFAULT_PRIORITY
    session_id: str | None = None
    character_id: str | None = None
    ttl_seconds: int | None = None
    batch_id: UUID | None = None
    uploads: dict[str, UUID] = {}
    regenerates: Original | None = None


async def unguarded() -> None:
    """For those who have room for anything."""


def fingerprint(body: Any) -> str:
    """A hash of a request's body that does not depend on the order of its keys."""
    return hashlib.sha256(msgspec.json.encode(body, order="deterministic")).hexdigest()


class _Turn:
    """Who decides next; when the log gave no answer, those who wait behind are told at once."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.unanswered_at = 0.0


class _Crowd:
    """Lets decisions pass beside each other, or one alone when none must overlook another."""

    def __init__(self) -> None:
        self.inside = 0
        self._alone = asyncio.Lock()
        self._nobody = asyncio.Event()
        self._nobody.set()

    @asynccontextmanager
    async def passing(self, jobs: int, *, alone: bool) -> AsyncIterator[None]:
        """Decide about so many jobs inside."""
        if alone:
            async with self._alone:
                while self.inside:
                    await self._nobody.wait()
                yield
            return
        self.inside += jobs
        self._nobody.clear()
        try:
            yield
        finally:
            self.inside -= jobs
            if not self.inside:
                self._nobody.set()


class _Seen(msgspec.Struct, frozen=True):
    """Which admissions a decision minds, and the newest of them it knows."""

    boundary: str
    seq: int


class AdmissionsState(msgspec.Struct, frozen=True):
    """All that admissions are decided by, at one event of the log."""

    line: LineState
    grants: GrantsState
    balances: BalancesState
    sizes: dict[str, tuple[int, int]]
    results: dict[str, int]


class Admissions:
    """Admits jobs within the limits, exactly: decides against the line, and the log refuses a decision that
    is out of date.

    It is fed (:meth:`apply`) by whoever follows the log, from its first event on, who sets ``caught_up`` and
    notifies ``moved``. Own admissions are taken in as soon as they are written. ``guard`` is asked before
    anything new is admitted that is to be drawn, and raises where the pictures would find no room.
    """

    def __init__(
        self,
        store: EventStore,
        line: Line,
        *,
        queue_limit: int,
        rate_per_hour: int,
        shelf: Shelf | None = None,
        guard: Callable[[], Awaitable[None]] = unguarded,
    ) -> None:
        self.store, self.line, self.guard = store, line, guard
        self.queue_limit, self.rate_per_hour = queue_limit, rate_per_hour
        self.jobs, self.library, self.shelf = Jobs(store), Library(store), shelf
        self.uploads = Uploads(store)
        self.grants, self.balances, self.sizes = Grants(), Balances(), Sizes()
        self.results = Results()
        self.caught_up = asyncio.Event()
        self.moved = asyncio.Condition()
        self._turns = [_Turn() for _ in range(_TURNS)]
        self._crowd = _Crowd()

    def apply(self, record: Recorded) -> None:
        """Take in one event of the log."""
        if self.line.apply(record):
            self.grants.apply(record)
            self.balances.apply(record)
            self.sizes.apply(record)
            self.results.apply(record)

    def state(self) -> AdmissionsState:
        """What was taken in so far, for a :class:`forge.snapshots.Snapshot`."""
        return AdmissionsState(
            self.line.state(),
            self.grants.state(),
            self.balances.state(),
            self.sizes.state(),
            self.results.state(),
        )

    def restore(self, state: AdmissionsState) -> None:
        """Know, before anything was taken in, what another process knew."""
        self.line.restore(state.line)
        self.grants.restore(state.grants)
        self.balances.restore(state.balances)
        self.sizes.restore(state.sizes)
        self.results.restore(state.results)

    async def submit(self, user: str, requests: Sequence[JobRequest], *, actor: str) -> list[Loaded]:
        """Admit all requests or none; keys that were used before answer with their jobs as they are.

        Raises:
            KeyReused: a key was used with another body.
            Invalid: an upload is not there, or not the user's; names the field.
            LimitReached: a limit of the user, the session or the character; nothing was admitted.
            QueueFull: too many jobs wait in all.
            DiskFull: what they bring could not be stored (or whatever else ``guard`` raises).
            LogUnavailable: the log gave no answer in time; repeat with the same Idempotency-Key.
        """

        async def attempt(seen: _Seen) -> list[Loaded]:
            closed = await self._closed()  # first: the line should not move between looking and deciding
            known = [await self._known(user, request) for request in requests]
            fresh = [request for request, job in zip(requests, known, strict=True) if job is None]
            await self.uploads.use(user, {f: id_ for r in fresh for f, id_ in r.uploads.items()}, actor=actor)
            if len(requests) == len(fresh) == 1 and (done := await self._reused(user, fresh[0], seen, actor)):
                return [done]
            if fresh:
                if closed:
                    raise closed
                await self._demand_room(fresh)
                self._demand_turn(user, len(fresh))
            made = iter(await self._admit(seen, [_submission(user, r) for r in fresh], "submit", actor))
            return [job or _fresh(next(made)) for job in known]

        accepted = await self._in_turn(user, len(requests), attempt)
        ids = [str(request.id) for request in requests]
        log.info("accepted", extra={"jobs": ids} if ids[1:] else {"job": ids[0]})
        return accepted

    async def retry(self, user: str, job_id: UUID, submitted_seq: int, *, actor: str) -> Loaded:
        """Admit a failed job again; ``submitted_seq`` is where its request stands.

        Raises:
            JobNotFailed: it has not failed, or was retried already.
            LimitReached, QueueFull: as for :meth:`submit`.
            LogUnavailable: as for :meth:`submit`.
        """

        async def attempt(seen: _Seen) -> Loaded:
            closed = await self._closed()
            while (waiting := self.line.jobs.get(job_id)) is not None:
                await self._leaves(user, waiting)
            loaded = await self.jobs.load(user, job_id, submitted_seq, timeout=SUBMIT_SECONDS)
            [event] = decide(Retry(), loaded.job)
            if closed:
                raise closed
            assert isinstance(event, JobRetried)
            self._demand_turn(user, 1)
            [record] = await self._admit(seen, [event], f"retry/{loaded.job.attempt}", actor)
            job = admitted(event, record.seq, record.meta.at)
            return msgspec.structs.replace(loaded, job=job, seq=record.seq)

        return await self._in_turn(user, 1, attempt)

    async def _leaves(self, user: str, waiting: Job) -> None:
        """Wait until this process has read that a job failed, as whoever wants it again has heard.

        Raises:
            JobNotFailed: it has not.
            LogUnavailable: forge does not hear from its log.
        """
        where = waiting.submitted_seq, waiting.admitted_seq
        decide(Retry(), (await self.jobs.load(user, waiting.id, *where, timeout=SUBMIT_SECONDS)).job)

        def left() -> bool:
            there = self.line.jobs.get(waiting.id)
            return there is None or there.admitted_seq != waiting.admitted_seq

        async with self.moved:
            await _within(self.moved.wait_for(left), "forge does not hear from its log")

    async def _closed(self) -> ForgeError | None:
        """Why nothing new may be admitted, if so."""
        try:
            await self.guard()
        except ForgeError as error:
            return error
        return None

    def limits(self, user: str, now: datetime | None = None) -> list[Limit]:
        """What a user may have, and has."""
        mine = [Limit("queued_jobs", MAX_QUEUED_JOBS, self.line.queued(user))]
        if self.rate_per_hour:
            mine.append(self.grants.limit(user, self.rate_per_hour, now or datetime.now(UTC)))
        return mine

    async def _reused(self, user: str, request: JobRequest, seen: _Seen, actor: str) -> Loaded | None:
        """The job, answered at once with what was drawn for its recipe before, if that is still there.

        It takes no place in the line and no generation of the hour.
        """
        drawn_at = self.results.find(request.recipe)
        if self.shelf is None or drawn_at is None:
            return None
        pictures = await self.shelf.recall(request.recipe, drawn_at)
        if not pictures or not answers(request.regenerates, pictures):
            return None
        now, asked = datetime.now(UTC), _submission(user, request)
        mine = [self.shelf.lent(picture, asked, now) for picture in pictures]
        reuse = Reuse(tuple(map(produced, mine)), now, regenerated(request.regenerates, mine))
        [done] = decide(reuse, admitted(asked, 0, now))
        entries = [
            Entry(asked, seen.boundary, seen.seq),
            *await self.library.entries(mine),
            Entry(done, facts_of(user, request.id), 0),
        ]
        drafts = drafts_of(entries, f"{request.id}/submit", actor, request.id)
        records = await self.store.append(drafts, within=SUBMIT_SECONDS)
        for record in records:
            self.apply(record)
        loaded, over = _fresh(records[0]), records[-1]
        job = evolve(loaded.job, over.event, over.meta.at)
        return msgspec.structs.replace(loaded, job=job, seq=over.seq, facts=(over,))

    def _demand_turn(self, user: str, wanted: int) -> None:
        demand_places(self.line.queued(user), wanted)
        demand_hour(self.grants, user, wanted, self.rate_per_hour, datetime.now(UTC))
        demand_queue(self.line.pending, wanted, self.queue_limit)

    async def _demand_room(self, requests: Sequence[JobRequest]) -> None:
        """Refuse what would be drawn in vain. The conclusion of a job is where these limits are exact."""
        for session_id in {r.session_id for r in requests if r.session_id is not None}:
            mine = [r for r in requests if r.session_id == session_id]
            held = self.balances.session(session_id)
            if held is None:
                held = (await self.library.held_by_session(session_id, timeout=SUBMIT_SECONDS)).amount
            owed = self.sizes.guess(self.line.owed_to_session(session_id))
            demand_session(held, owed, sum(self.sizes.guess({r.asset_type: r.pictures}) for r in mine))
        for character_id in {r.character_id for r in requests if r.character_id is not None}:
            wanted = sum(r.pictures for r in requests if r.character_id == character_id)
            held = self.balances.character(character_id)
            if held is None:
                held = (await self.library.held_by_character(character_id, timeout=SUBMIT_SECONDS)).amount
            demand_character(held, self.line.owed_to_character(character_id), wanted)

    async def _admit(
        self, seen: _Seen, events: Sequence[Admission], command: str, actor: str
    ) -> list[Recorded]:
        if not events:
            return []
        drafts = [
            draft
            for nth, e in enumerate(events)
            for draft in drafts_of(
                [Entry(e) if nth else Entry(e, seen.boundary, seen.seq)],
                f"{e.job_id}/{command}",
                actor,
                e.job_id,
            )
        ]
        records = await self.store.append(drafts, within=SUBMIT_SECONDS)
        for record in records:
            self.apply(record)
        return records

    async def _in_turn(self, user: str, wanted: int, attempt: Callable[[_Seen], Awaitable[T]]) -> T:
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
                async with self._crowd.passing(wanted, alone=self._crowded(wanted)):
                    return await self._decided(user, attempt)
            except LogUnavailable:
                turn.unanswered_at = time.monotonic()
                raise

    async def _decided(self, user: str, attempt: Callable[[_Seen], Awaitable[T]]) -> T:
        for _ in range(_TRIES):
            seen = self._seen(user)
            try:
                return await attempt(seen)
            except Conflict:
                await self._catch_up(user, seen)
            except (LimitReached, QueueFull):
                # what filled the last place meanwhile may have been this very request, at another process
                if self._seen(user) == seen:
                    raise
        raise LogUnavailable(f"{user}'s requests come faster than they can be decided")

    def _crowded(self, wanted: int = 0) -> bool:
        """Whether the bound of the queue may decide: then every admission minds every other, whoever's it is
        and whichever process grants it. Until then so many processes do not fill it together."""
        return _PROCESSES * (self.line.pending + self._crowd.inside + wanted) > self.queue_limit

    def _seen(self, user: str) -> _Seen:
        if self._crowded():
            return _Seen(ALL_ADMISSIONS, self.line.last_admission)
        return _Seen(admissions(user), self.line.admission_seq.get(user, 0))

    async def _catch_up(self, user: str, seen: _Seen) -> None:
        def newer() -> bool:
            if seen.boundary == ALL_ADMISSIONS:
                return self.line.last_admission > seen.seq
            return self.line.admission_seq.get(user, 0) > seen.seq

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
        recipe=request.recipe,
        pictures=request.pictures,
        session_id=request.session_id,
        character_id=request.character_id,
        batch_id=request.batch_id,
        ttl_seconds=request.ttl_seconds,
        regenerates=request.regenerates,
    )


def _fresh(record: Recorded) -> Loaded:
    assert isinstance(record.event, JobSubmitted)
    job = admitted(record.event, record.seq, record.meta.at)
    return Loaded(job, record.event, record.meta, record.seq)
