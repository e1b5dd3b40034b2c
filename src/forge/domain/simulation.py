"""What would have been: recorded requests under other limits, event by event. No I/O, no clock, no chance.

Requests come when they came. The rules are the live ones: admission (:mod:`forge.domain.admission`), the
line (:mod:`forge.domain.dispatch`), a job's life (:mod:`forge.domain.jobs`), balances
(:mod:`forge.domain.assets`), what goes (:mod:`forge.domain.retention`). They are fed a log that this writes,
and only what the outside did is taken from the recording: what a prompt takes, how it fails, what it brings,
who cancels, deletes and pins.

A backend draws one prompt at a time, in the order of starts; ``slots`` are at it or wait there. What forge
itself takes between two steps counts as nothing.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import UUID

import msgspec

from forge.domain import assets, retention
from forge.domain.admission import (
    Balances,
    Grants,
    Sizes,
    demand_character,
    demand_hour,
    demand_places,
    demand_queue,
    demand_session,
)
from forge.domain.disk import CLEAN, Disk, Lines, full, rank
from forge.domain.dispatch import Line
from forge.domain.ids import asset_id, derived_id
from forge.domain.jobs import (
    Cancel,
    Command,
    Complete,
    FailAttempt,
    Job,
    Retry,
    Reuse,
    Start,
    Status,
    decide,
    evolve,
)
from forge.domain.limits import MAX_QUEUED_JOBS, MAX_RUNNING_JOBS
from forge.domain.recording import Act, Case, Recording, Tried
from forge.domain.retention import EVICTED, EXPIRED, Claim, Kept
from forge.errors import DiskFull, ForgeError, LimitReached, QueueFull
from forge.events.assets import AssetGivenUp, AssetPinned, AssetReady, AssetStored, AssetUnpinned
from forge.events.catalogue import Event
from forge.events.envelope import Meta, Recorded
from forge.events.jobs import JobCompleted, JobRetried, JobStarted, JobSubmitted

_ID = UUID(int=0)
_ALL = 2**62
_NEVER = datetime.min.replace(tzinfo=UTC)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The limits to go by. ``gpus`` backends draw at once; a ``disk_limit`` of None is no limit."""

    rate_per_hour: int
    queue_limit: int
    ttl_seconds: int
    ttls: dict[str, int] = {}
    slots: int = MAX_RUNNING_JOBS
    queue_per_user: int = MAX_QUEUED_JOBS
    gpus: int = 1
    disk_limit: int | None = None
    lines: Lines = Lines(0.8, 0.9)
    target_ratio: float = 0.8

    def ttl_of(self, asked: JobSubmitted) -> timedelta:
        ttl = asked.ttl_seconds or self.ttls.get(asked.asset_type, self.ttl_seconds)
        return timedelta(seconds=ttl)


class Went(msgspec.Struct, frozen=True):
    """How one job went: who asked, how urgently, seconds until it was at a backend and until it was done;
    None where it never was."""

    user: str
    priority: int
    waited: float | None
    took: float | None
    outcome: str


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How it all went. ``refused`` counts requests by the limit they met, None where that is not known;
    ``busy`` and ``span`` are seconds of backends at work and of the whole; bytes of pictures."""

    jobs: list[Went]
    refused: dict[str, int] | None
    busy: float
    span: float
    gpus: int
    disk_peak: int
    disk_end: int


def recorded(recording: Recording, since: datetime, until: datetime) -> Outcome:
    """How it really went, of the requests in a stretch of time."""
    cases = [case for case in recording.cases.values() if since <= case.at <= until]
    ends = [case.ended_at for case in cases if case.ended_at is not None]
    last = max(ends, default=until)
    before = [point.bytes for point in recording.disk if point.at < since]
    within = [point.bytes for point in recording.disk if since <= point.at <= max(until, last)]
    within = [*before[-1:], *within] or [0]
    return Outcome(
        jobs=[
            _went(case.asked, case.at, case.first_start, case.ended_at, case.outcome or "open")
            for case in cases
        ],
        refused=None,
        busy=sum(took.total_seconds() for at, took in recording.busy if since <= at <= last),
        span=max(0.0, (last - min((case.at for case in cases), default=last)).total_seconds()),
        gpus=1,
        disk_peak=max(within),
        disk_end=within[-1],
    )


def simulate(recording: Recording, rules: Rules, since: datetime, until: datetime) -> Outcome:
    """How the requests of a stretch of time would have gone, the log before it being what it is."""
    return _World(recording, rules, since, until).run()


def _went(
    asked: JobSubmitted, at: datetime, start: datetime | None, end: datetime | None, outcome: str
) -> Went:
    return Went(
        asked.user_id,
        asked.priority,
        None if start is None else (start - at).total_seconds(),
        None if end is None or outcome not in ("completed", "cached") else (end - at).total_seconds(),
        outcome,
    )


class _Kept(msgspec.Struct):
    """One job's references to an asset."""

    claim: Claim
    created_at: datetime
    expires_at: datetime | None
    pinned: bool = False


class _World:
    def __init__(self, recording: Recording, rules: Rules, since: datetime, until: datetime) -> None:
        self.recording, self.rules, self.since, self.until = recording, rules, since, until
        self.line, self.grants, self.sizes, self.balances = Line(), Grants(), Sizes(), Balances(_ALL)
        self.shelf: dict[str, list[AssetStored]] = {}
        self.kept: dict[tuple[UUID, UUID], _Kept] = {}
        self.owners: dict[UUID, set[UUID]] = {}
        self.bytes: dict[UUID, int] = {}
        self.used = self.peak = 0
        self.full = False
        self.free = [since] * rules.gpus
        self.ends: dict[UUID, tuple[datetime, datetime]] = {}
        self.busy = 0.0
        self.stored: dict[UUID, list[AssetStored]] = {}
        self.failed: dict[UUID, Job] = {}
        self.retries: Counter[UUID] = Counter()
        self.starts: dict[UUID, datetime] = {}
        self.over: dict[UUID, tuple[datetime, str]] = {}
        self.refused: Counter[str] = Counter()
        self.cases: dict[UUID, Case] = {}
        self._agenda: list[tuple[datetime, int, Any, tuple[Any, ...]]] = []
        self._order, self._seqs = count(), count(1)
        self._jobs_to_come = 0

    # ------------------------------------------------------------------ running

    def run(self) -> Outcome:
        self._prologue()
        for group in self._groups():
            self._jobs_to_come += 1
            self._plan(group[0].at, self._arrive, group)
        cases = self.recording.cases.values()
        first = min((case.at for case in cases if self.since <= case.at), default=self.until)
        while self._agenda:
            when, _, act, given = heapq.heappop(self._agenda)
            if when > self.until and not self._jobs_to_come and not self.line.jobs:
                break
            act(when, *given)
            self._fill(when)
        ends = [end for end, _ in self.over.values()]
        return Outcome(
            jobs=[
                _went(case.asked, case.at, self.starts.get(id_), *self.over.get(id_, (None, "open")))
                for id_, case in self.cases.items()
                if case.at >= self.since
            ],
            refused=dict(self.refused),
            busy=self.busy,
            span=max(0.0, (max(ends, default=self.until) - first).total_seconds()),
            gpus=self.rules.gpus,
            disk_peak=self.peak,
            disk_end=self.used,
        )

    def _prologue(self) -> None:
        """What was before: taken as it was. What waits or runs then goes on from there."""
        for record in self.recording.records:
            if record.meta.at >= self.since:
                break
            self._take(Recorded(next(self._seqs), record.subject, record.meta, record.event))
        self.peak = self.used
        ended = max((at for at, _ in self.recording.busy if at < self.since), default=None)
        self.free = [ended or _NEVER] * self.rules.gpus
        for job in sorted(self.line.running(), key=lambda job: job.started_at or self.since):
            self._occupy(job, job.started_at or self.since)
        for id_ in self.line.jobs:
            self._expect(id_, self.recording.cases[id_])
        for key, kept in self.kept.items():
            self._plan_expiry(key, kept)
        self.cases |= {id_: self.recording.cases[id_] for id_ in self.line.jobs}

    def _groups(self) -> list[list[Case]]:
        """The requests in order; those of a batch together."""
        groups: list[list[Case]] = []
        for case in self.recording.cases.values():
            if not self.since <= case.at <= self.until:
                continue
            batch = case.asked.batch_id
            if batch is not None and groups and groups[-1][0].asked.batch_id == batch:
                groups[-1].append(case)
            else:
                groups.append([case])
        return groups

    def _plan(self, when: datetime, act: Any, *given: Any) -> None:
        heapq.heappush(self._agenda, (when, next(self._order), act, given))

    def _tell(self, now: datetime, *events: Event) -> None:
        for event in events:
            meta = Meta(id=_ID, at=now, actor="", correlation="")
            self._take(Recorded(next(self._seqs), "", meta, event))

    def _take(self, record: Recorded) -> None:
        """Every fold of the live system takes in the event, and what stands for the tables."""
        self.line.apply(record)
        for fold in (self.grants, self.sizes, self.balances):
            fold.apply(record)
        event, at = record.event, record.meta.at
        match event:
            case AssetStored():
                self.stored.setdefault(event.job_id, []).append(event)
                self._keep(event)
            case AssetGivenUp():
                self._forget(event)
            case JobStarted():
                self.starts.setdefault(event.job_id, at)
            case JobCompleted():
                pictures = self.stored.pop(event.job_id, [])
                if event.recipe and pictures:
                    self.shelf[event.recipe] = pictures
                self.over[event.job_id] = at, "cached" if event.cached else "completed"
            case AssetPinned() | AssetUnpinned():
                kept = self.kept.get((event.asset_id, event.job_id))
                if kept is not None:
                    kept.pinned = isinstance(event, AssetPinned)
            case _:
                pass

    # ----------------------------------------------------------------- admission

    def _arrive(self, now: datetime, group: Sequence[Case]) -> None:
        self._jobs_to_come -= 1
        asked = [case.asked for case in group]
        try:
            if len(asked) == 1 and (pictures := self._on_shelf(asked[0])):
                self._counted_in(self._lent(now, asked[0], pictures))
                self._admit(now, group)
                self._reuse(now, self.line.jobs[asked[0].job_id], asked[0], pictures)
                return
            self._demand_room(asked)
            self._demand_turn(asked[0].user_id, len(asked), now)
        except (LimitReached, QueueFull, DiskFull) as refusal:
            self.refused[_name(refusal)] += len(asked)
            return
        self._admit(now, group)

    def _admit(self, now: datetime, group: Sequence[Case]) -> None:
        for case in group:
            id_ = case.asked.job_id
            self.cases[id_] = case
            self._tell(now, case.asked)
            self._expect(id_, case)

    def _expect(self, id_: UUID, case: Case) -> None:
        if case.cancelled_at is not None:
            self._plan(case.cancelled_at, self._cancel, id_)

    def _demand_turn(self, user: str, wanted: int, now: datetime) -> None:
        demand_places(self.line.queued(user), wanted, self.rules.queue_per_user)
        demand_hour(self.grants, user, wanted, self.rules.rate_per_hour, now)
        demand_queue(self.line.pending, wanted, self.rules.queue_limit)

    def _demand_room(self, asked: Sequence[JobSubmitted]) -> None:
        if self.full:
            raise DiskFull
        for session in sorted({a.session_id for a in asked if a.session_id is not None}):
            mine = Counter[str]()
            for a in asked:
                mine[a.asset_type] += a.pictures if a.session_id == session else 0
            owed = self.sizes.guess(self.line.owed_to_session(session))
            demand_session(self.balances.session(session) or 0, owed, self.sizes.guess(mine))
        for character in sorted({a.character_id for a in asked if a.character_id is not None}):
            wanted = sum(a.pictures for a in asked if a.character_id == character)
            held = self.balances.character(character) or 0
            demand_character(held, self.line.owed_to_character(character), wanted)

    def _retry(self, now: datetime, id_: UUID) -> None:
        self._jobs_to_come -= 1
        job = self.failed.pop(id_)
        [event] = decide(Retry(), job)
        assert isinstance(event, JobRetried)
        try:
            self._demand_turn(job.user_id, 1, now)
        except (LimitReached, QueueFull) as refusal:
            self.refused[_name(refusal)] += 1
            return
        self.over.pop(id_, None)
        self._tell(now, event)

    # ------------------------------------------------------------------- drawing

    def _fill(self, now: datetime) -> None:
        due = self.line.release(now)
        while len(self.line.jobs) - self.line.pending < self.rules.slots and not self.full:
            choice = self.line.choose()
            if choice is None:
                break
            job, asked = choice.job, self.cases[choice.job.id].asked
            if pictures := self._on_shelf(asked):
                self._reuse(now, job, asked, pictures)
                continue
            self._act(now, job, Start(job.attempt + 1, "", "", choice.reason))
            self._occupy(self.line.jobs[job.id], now)
        if due is not None and due > now:
            self._plan(due, _nothing)

    def _occupy(self, job: Job, now: datetime) -> None:
        """A backend takes the prompt as soon as it is done with those before."""
        tried = self._tried(job)
        took = self.recording.usual(job.job_type) if tried.took is None else tried.took
        begin = max(now, heapq.heappop(self.free))
        heapq.heappush(self.free, begin + took)
        self.ends[job.id] = begin, begin + took
        self._plan(max(begin + took, self.since), self._end, job.id, job.attempt)

    def _tried(self, job: Job) -> Tried:
        """How this attempt went; one that never was takes what is usual, and goes well."""
        tries = self.recording.cases[job.id].tries
        return tries[job.attempt - 1] if job.attempt <= len(tries) else Tried(None)

    def _end(self, now: datetime, id_: UUID, attempt: int) -> None:
        job = self.line.jobs.get(id_)
        if job is None or job.status is not Status.RUNNING or job.attempt != attempt:
            return
        begin, end = self.ends.pop(id_)
        self.busy += (end - begin).total_seconds()
        tried = self._tried(job)
        if tried.code:
            self._fail(now, job, tried.code, tried.final)
            return
        asked = self.cases[id_].asked
        try:
            self._conclude(now, job, self._pictures(now, asked), cached=False)
        except LimitReached as refusal:
            self._fail(now, job, refusal.code, True)

    def _fail(self, now: datetime, job: Job, code: str, final: bool) -> None:
        after = self._act(now, job, FailAttempt(job.attempt, code, "", final, now))
        if after.status is not Status.FAILED:
            return
        self.over[job.id] = now, "failed"
        nth, lags = self.retries[job.id], self.recording.cases[job.id].retried_after
        if nth < len(lags):
            self.retries[job.id] += 1
            self._jobs_to_come += 1
            self.failed[job.id] = after
            self._plan(now + lags[nth], self._retry, job.id)

    def _cancel(self, now: datetime, id_: UUID) -> None:
        job = self.line.jobs.get(id_)
        if job is None:
            return
        self._act(now, job, Cancel())
        self.over[id_] = now, "cancelled"
        if id_ in self.ends:
            begin, end = self.ends.pop(id_)
            self.busy += max(0.0, (min(now, end) - begin).total_seconds())
            if end in self.free:  # nobody stands behind it there
                self.free.remove(end)
                self.free.append(max(begin, now))
                heapq.heapify(self.free)

    def _act(self, now: datetime, job: Job, command: Command) -> Job:
        events = decide(command, job)
        self._tell(now, *events)
        for event in events:
            job = evolve(job, event, now)
        return job

    # ------------------------------------------------------------------- library

    def _on_shelf(self, asked: JobSubmitted) -> list[AssetStored]:
        """The pictures of the recipe, if all of them are still there."""
        pictures = self.shelf.get(asked.recipe, []) if asked.recipe else []
        there = all(self.owners.get(p.asset_id) for p in pictures)
        return pictures if there and assets.answers(asked.regenerates, pictures) else []

    def _reuse(self, now: datetime, job: Job, asked: JobSubmitted, pictures: Sequence[AssetStored]) -> None:
        try:
            self._conclude(now, job, self._lent(now, asked, pictures), cached=True)
        except LimitReached as refusal:
            self._tell(now, *decide(Start(job.attempt + 1, "", "", ""), job))
            self._fail(now, self.line.jobs[job.id], refusal.code, True)

    def _lent(self, now: datetime, asked: JobSubmitted, pictures: Sequence[AssetStored]) -> list[AssetStored]:
        return [assets.lent(picture, asked, now, self.rules.ttl_of(asked)) for picture in pictures]

    def _pictures(self, now: datetime, asked: JobSubmitted) -> list[AssetStored]:
        """What a job brings: what it brought, or else as many pictures of the usual size."""
        until = now + self.rules.ttl_of(asked)
        known = self.recording.cases[asked.job_id].pictures
        if not known:
            known = [self._made_up(asked, nth) for nth in range(asked.pictures)]
        change = msgspec.structs.replace
        return [change(p, created_at=now, expires_at=until, session_bytes=None) for p in known]

    def _made_up(self, asked: JobSubmitted, nth: int) -> AssetStored:
        name = derived_id("simulated", str(asked.job_id), str(nth)).hex * 2
        return AssetStored(
            asset_id=asset_id(name),
            job_id=asked.job_id,
            user_id=asked.user_id,
            asset_type=asked.asset_type,
            content_hash=name,
            pixel_hash=name,
            format="png",
            file_path="",
            file_size_bytes=self.sizes.guess({asked.asset_type: 1}),
            width=0,
            height=0,
            dominant_color="",
            position=nth,
            generation_params={},
            created_at=self.since,
            session_id=asked.session_id,
            character_id=asked.character_id,
        )

    def _conclude(self, now: datetime, job: Job, pictures: Sequence[AssetStored], *, cached: bool) -> None:
        stored = self._counted_in(pictures)
        made = tuple(map(assets.produced, pictures))
        command = Reuse(made, now) if cached else Complete(job.attempt, job.worker, made, now)
        self._tell(now, *stored)
        self._act(now, job, command)
        for picture in pictures:
            key = picture.asset_id, picture.job_id
            self._plan_expiry(key, self.kept[key])
        for act in self.recording.cases[job.id].acts:
            self._plan(now + act.after, self._owner_acts, job.id, act)
        self._look_at_disk(now)

    def _counted_in(self, pictures: Sequence[AssetStored]) -> list[AssetStored | AssetReady]:
        """A job's pictures with the balances after them.

        Raises:
            LimitReached: session or character would hold too much.
        """
        session, character = pictures[0].session_id, pictures[0].character_id
        held = (self.balances.session(session) or 0) if session else 0
        had = (self.balances.character(character) or 0) if character else 0
        return assets.count_in(pictures, held, had)

    def _keep(self, stored: AssetStored) -> None:
        key = stored.asset_id, stored.job_id
        before = self.kept.get(key)
        claim = Claim(
            asset_id=stored.asset_id,
            job_id=stored.job_id,
            asset_type=stored.asset_type,
            user_id=stored.user_id,
            session_id=stored.session_id,
            character_id=stored.character_id,
            content_hash=stored.content_hash,
            format=stored.format,
            pictures=1 if before is None else before.claim.pictures + 1,
            size_bytes=stored.file_size_bytes,
        )
        self.kept[key] = _Kept(claim, stored.created_at, stored.expires_at)
        owners = self.owners.setdefault(stored.asset_id, set())
        if not owners:
            self.bytes[stored.asset_id] = stored.file_size_bytes
            self.used += stored.file_size_bytes
            self.peak = max(self.peak, self.used)
        owners.add(stored.job_id)

    def _forget(self, gone: AssetGivenUp) -> None:
        self.kept.pop((gone.asset_id, gone.job_id), None)
        owners = self.owners.get(gone.asset_id, set())
        owners.discard(gone.job_id)
        if not owners and gone.asset_id in self.bytes:
            self.used -= self.bytes.pop(gone.asset_id)
            del self.owners[gone.asset_id]

    def _plan_expiry(self, key: tuple[UUID, UUID], kept: _Kept) -> None:
        if kept.expires_at is not None:
            self._plan(max(kept.expires_at, self.since), self._expire, key)

    def _expire(self, now: datetime, key: tuple[UUID, UUID]) -> None:
        kept = self.kept.get(key)
        if kept is not None and not kept.pinned and kept.expires_at is not None and kept.expires_at <= now:
            self._give_up(now, kept, EXPIRED)
            self._look_at_disk(now)

    def _owner_acts(self, now: datetime, id_: UUID, act: Act) -> None:
        kept = self.kept.get((act.asset_id, id_))
        if kept is None:
            return
        if act.kind == "delete":
            self._give_up(now, kept, "requested")
            self._look_at_disk(now)
        else:
            kept.pinned = act.kind == "pin"
            self._expire(now, (act.asset_id, id_))

    def _give_up(self, now: datetime, kept: _Kept, reason: str) -> None:
        gone = retention.given_up(kept.claim, reason)
        session = self.balances.session(gone.session_id) if gone.session_id else 0
        character = self.balances.character(gone.character_id) if gone.character_id else 0
        self._tell(now, *assets.give_back(gone, session or 0, character or 0))

    def _look_at_disk(self, now: datetime) -> None:
        """Past the clean-up line the least worth goes, as far as it may; full is when that was not enough."""
        limit = self.rules.disk_limit
        if limit is None:
            return
        if rank(self._disk(limit), self.rules.lines) >= CLEAN:
            need = retention.too_many_bytes(self.used, limit, self.rules.target_ratio)
            for asset in retention.least_worth(self._by_asset(), need, now):
                for job_id in sorted(self.owners.get(asset.id, set())):
                    self._give_up(now, self.kept[asset.id, job_id], EVICTED)
        self.full = full(self._disk(limit), self.rules.lines, self.full)

    def _disk(self, limit: int) -> Disk:
        return Disk(self.used, limit, max(0, limit - self.used))

    def _by_asset(self) -> list[Kept]:
        found = []
        for id_, owners in self.owners.items():
            mine = [self.kept[id_, job] for job in owners]
            until = [kept.expires_at for kept in mine]
            found.append(
                Kept(
                    id=id_,
                    size_bytes=self.bytes[id_],
                    created_at=min(kept.created_at for kept in mine),
                    expires_at=None if None in until else max(at for at in until if at is not None),
                    pinned=any(kept.pinned for kept in mine),
                )
            )
        return found


def _nothing(now: datetime) -> None:
    """Somebody's back-off is over: filling the places is all there is to do."""


def _name(refusal: ForgeError) -> str:
    return refusal.limit.name if isinstance(refusal, LimitReached) else refusal.code
