"""Which waiting job is next: priority, fairness between users, ageing. A fold of the log, no I/O, no clock.

The order
    The lowest *level* first. A job's level is its priority less one for every ``AGEING`` starts it has seen
    while waiting, and never less than 1. Within a level the user whose turn is the longest ago; within a
    user first in, first out. Time is counted in starts, so that every dispatcher that has read the same log
    chooses the same job, whatever its clock says.

The bound
    A job of priority *p*, with *a* jobs of its own user before it and at most *u* users waiting at any time,
    starts within ``(p - 1) * AGEING + (a + 1) * u`` starts, and those of the orders that are out already:
    see :func:`bound`. A user who comes later enters the ring behind those who wait, so a stream of new users
    starves nobody.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from uuid import UUID

import msgspec

from forge.domain.jobs import Job, Status, admitted, evolve
from forge.events.envelope import Recorded
from forge.events.jobs import JobRetried, JobStarted, JobSubmitted

AGEING = 20
"""Starts that lift a waiting job by one level."""

_NOBODY = UUID(int=0)


class Waiting(msgspec.Struct, frozen=True):
    """A job's place in the line: where it was admitted, and how many starts there had been by then."""

    job_id: UUID
    user_id: str
    priority: int
    seq: int
    since: int


class Choice(msgspec.Struct, frozen=True):
    """The next job and why it is next."""

    job: Job
    reason: str


class LineState(msgspec.Struct, frozen=True):
    """All that a line knows at one event of the log; ``waiting`` in the order in which its jobs joined."""

    jobs: tuple[Job, ...]
    waiting: tuple[Waiting, ...]
    turns: dict[str, int]
    delayed: tuple[tuple[datetime, int, UUID], ...]
    admission_seq: dict[str, int]
    last_admission: int
    starts: int
    version: int


def bound(priority: int, own_ahead: int, users: int, places: int) -> int:
    """Starts after which a waiting job has started at the latest, itself included.

    ``places`` orders may be out; it holds as long as they start in the order they were given.
    """
    return (priority - 1) * AGEING + (own_ahead + 1) * users + places - 1


class Line:
    """Every job that is not over, in the order the rules give. Feed it the log with :meth:`apply`."""

    def __init__(self) -> None:
        self.jobs: dict[UUID, Job] = {}
        self.admission_seq: dict[str, int] = {}
        self.last_admission = 0
        self.starts = 0
        self.pending = 0
        self.version = 0
        self._lanes: dict[str, dict[int, deque[Waiting]]] = {}
        self._turn: dict[str, int] = {}
        self._delayed: list[tuple[datetime, int, UUID]] = []
        self._queued: Counter[str] = Counter()
        self._drawing: Counter[str] = Counter()
        self._owed_to_sessions: dict[str, Counter[str]] = {}
        self._owed_to_characters: Counter[str] = Counter()

    # ---------------------------------------------------------------- folding

    def apply(self, record: Recorded) -> bool:
        """Take in one event of the log; False for an admission that was seen before and changes nothing."""
        event, at = record.event, record.meta.at
        self.release(at)  # by the log's clock, so that a replay lets a job join where the first reading did
        if isinstance(event, JobSubmitted | JobRetried):
            if record.seq <= self.admission_seq.get(event.user_id, 0):
                return False
            self.admission_seq[event.user_id] = record.seq
            self.last_admission = max(self.last_admission, record.seq)
            self._replace(admitted(event, record.seq, at), record)
        elif (job := self.jobs.get(getattr(event, "job_id", _NOBODY))) is not None:
            self._replace(evolve(job, event, at), record)
        return True

    def _replace(self, job: Job, record: Recorded) -> None:
        before = self.jobs.pop(job.id, None)
        self.version += 1
        self._count(before, -1)
        self._count(job, 1)
        if before is not None and before.status is Status.PENDING:
            self.pending -= 1
            self._leave(before)
        if isinstance(record.event, JobStarted):
            self.starts += 1
            if job.user_id in self._lanes:
                self._turn[job.user_id] = self.starts
        if not job.status.over:
            self.jobs[job.id] = job
        if job.status is Status.PENDING:
            self.pending += 1
            self._enter(job, record.seq)

    def _count(self, job: Job | None, by: int) -> None:
        """Keep what users, sessions and characters have in the line; what is used up leaves no trace."""
        if job is None or job.status.over:
            return
        _add(self._queued, job.user_id, by)
        if job.recipe and job.status is Status.RUNNING:
            _add(self._drawing, job.recipe, by)
        if job.character_id is not None:
            _add(self._owed_to_characters, job.character_id, by * job.pictures)
        if job.session_id is not None:
            owed = self._owed_to_sessions.setdefault(job.session_id, Counter())
            _add(owed, job.asset_type, by * job.pictures)
            if not owed:
                del self._owed_to_sessions[job.session_id]

    def _enter(self, job: Job, seq: int) -> None:
        if job.retry_at is None:
            self._join(job, seq)
        else:
            heapq.heappush(self._delayed, (job.retry_at, seq, job.id))

    def _join(self, job: Job, seq: int) -> None:
        lanes = self._lanes.setdefault(job.user_id, {})
        if not lanes:
            self._turn[job.user_id] = self.starts
        lane = lanes.setdefault(job.priority, deque())
        lane.append(Waiting(job.id, job.user_id, job.priority, seq, self.starts))

    def _leave(self, job: Job) -> None:
        lanes = self._lanes.get(job.user_id, {})
        lane = lanes.get(job.priority)
        if lane is None:
            return
        if lane and lane[0].job_id == job.id:
            lane.popleft()
        else:
            lanes[job.priority] = lane = deque(w for w in lane if w.job_id != job.id)
        if not lane:
            del lanes[job.priority]
        if not lanes:
            del self._lanes[job.user_id], self._turn[job.user_id]

    def state(self) -> LineState:
        """What was taken in so far, for a :class:`forge.snapshots.Snapshot`."""
        return LineState(
            tuple(self.jobs.values()),
            tuple(w for lanes in self._lanes.values() for lane in lanes.values() for w in lane),
            dict(self._turn),
            tuple(self._delayed),
            dict(self.admission_seq),
            self.last_admission,
            self.starts,
            self.version,
        )

    def restore(self, state: LineState) -> None:
        """Know, while still empty, what another line knew."""
        self.admission_seq, self.last_admission = dict(state.admission_seq), state.last_admission
        self.starts, self.version = state.starts, state.version
        for job in state.jobs:
            self.jobs[job.id] = job
            self._count(job, 1)
            self.pending += job.status is Status.PENDING
        for w in state.waiting:
            self._lanes.setdefault(w.user_id, {}).setdefault(w.priority, deque()).append(w)
        self._turn, self._delayed = dict(state.turns), list(state.delayed)

    # ---------------------------------------------------------------- knowing

    def queued(self, user: str) -> int:
        """Jobs of a user that are not over."""
        return self._queued[user]

    def owed_to_session(self, session_id: str) -> Mapping[str, int]:
        """Asset type → pictures that jobs which are not over will bring the session."""
        return self._owed_to_sessions.get(session_id, {})

    def owed_to_character(self, character_id: str) -> int:
        """Pictures that jobs which are not over will bring the character."""
        return self._owed_to_characters[character_id]

    # --------------------------------------------------------------- choosing

    def release(self, now: datetime) -> datetime | None:
        """Let the jobs whose back-off is over join the line; the time of the next one, if any waits."""
        while self._delayed and self._delayed[0][0] <= now:
            retry_at, seq, job_id = heapq.heappop(self._delayed)
            job = self.jobs.get(job_id)
            if job is not None and job.status is Status.PENDING and job.retry_at == retry_at:
                self._join(job, seq)
        return self._delayed[0][0] if self._delayed else None

    def choose(self, given: Collection[UUID] = ()) -> Choice | None:
        """The next job, with the reason; None when nobody waits.

        ``given`` are the jobs whose order is out but whose start the log does not tell yet, in the order they
        were given: they count as started. A job whose very recipe is being drawn is passed over until that is
        done: then it need not be drawn at all.
        """
        turns = {
            self.jobs[id_].user_id: self.starts + nth for nth, id_ in enumerate(given, 1) if id_ in self.jobs
        }
        ranked = (
            (self._level(head), turns.get(head.user_id, self._turn[head.user_id]), head.seq, head)
            for head in self._heads(given)
        )
        best = min(ranked, default=None, key=lambda rank: rank[:3])
        if best is None:
            return None
        level, turn, _, head = best
        return Choice(self.jobs[head.job_id], self._reason(head, level, turn))

    def order(self) -> list[UUID]:
        """All jobs in the line, next first, if nothing else came and nobody aged."""
        levels: dict[int, dict[str, list[Waiting]]] = {}
        for lanes in self._lanes.values():
            for lane in lanes.values():
                for w in lane:
                    levels.setdefault(self._level(w), {}).setdefault(w.user_id, []).append(w)
        turns, found = dict(self._turn), list[UUID]()
        for _, users in sorted(levels.items()):
            for mine in users.values():
                mine.sort(key=lambda w: w.seq, reverse=True)
            ring = [(turns[user], mine[-1].seq, user) for user, mine in users.items()]
            heapq.heapify(ring)
            while ring:
                _, _, user = ring[0]
                found.append(users[user].pop().job_id)
                turns[user] = self.starts + len(found)
                if users[user]:
                    heapq.heapreplace(ring, (turns[user], users[user][-1].seq, user))
                else:
                    heapq.heappop(ring)
        return found

    def running(self) -> Iterator[Job]:
        return (job for job in self.jobs.values() if job.status is Status.RUNNING)

    def _heads(self, given: Collection[UUID]) -> Iterator[Waiting]:
        jobs = self.jobs
        at_work = {jobs[id_].recipe for id_ in given if id_ in jobs} | self._drawing.keys()
        at_work.discard("")
        for lanes in self._lanes.values():
            for lane in lanes.values():
                free = (
                    w for w in lane if w.job_id not in given and self.jobs[w.job_id].recipe not in at_work
                )
                head = next(free, None)
                if head is not None:
                    yield head

    def _level(self, waiting: Waiting) -> int:
        return max(1, waiting.priority - (self.starts - waiting.since) // AGEING)

    def _reason(self, head: Waiting, level: int, turn: int) -> str:
        aged = f", aged to {level}" if level < head.priority else ""
        rested = max(0, self.starts - turn)
        return (
            f"priority {head.priority}{aged}; waited {self.starts - head.since} starts; "
            f"{head.user_id}'s turn after {rested} starts among {len(self._lanes)} waiting users"
        )


def _add(counter: Counter[str], key: str, by: int) -> None:
    counter[key] += by
    if not counter[key]:
        del counter[key]
