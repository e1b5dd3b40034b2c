"""One job's life as acts on the log: load its facts, decide, append, and again on a conflict.

Nothing here knows Postgres.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

import msgspec

from forge.domain.jobs import Command, Job, admitted, decide, evolve
from forge.errors import (
    Conflict,
    LogUnavailable,
    NotFound,
)
from forge.events.envelope import Meta, Recorded
from forge.events.jobs import JobCancelled, JobCompleted, JobRetried, JobStarted, JobSubmitted
from forge.eventstore import Entry, EventStore, drafts_of
from forge.topology import job as facts_of

SUBMIT_SECONDS = 0.8
"""How long a client waits for the log before it is told to come again."""

_TRIES = 20


class Loaded(msgspec.Struct, frozen=True):
    """A job as the log tells it: its state, its request, and the last sequence of its facts."""

    job: Job
    request: JobSubmitted
    requested: Meta
    seq: int
    facts: tuple[Recorded, ...] = ()
    """As :meth:`forge.eventstore.EventStore.load` gives them: of adoptions of one attempt only the newest."""


async def no_entries() -> list[Entry]:
    """For a decision that stands alone."""
    return []


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
        return next(filter(None, map(_submitted_seq, facts.events)), None)

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
        *others, last = entries
        mine = Entry(last.event, facts_of(job.user_id, job.id), loaded.seq)
        drafts = drafts_of([*others, mine], f"{job.id}/{job.admitted_seq}/{name}", actor, job.id)
        return await self.store.append(drafts, within=within)


def _submitted_seq(record: Recorded) -> int | None:
    match record.event:
        case JobStarted() | JobCancelled():
            return record.event.submitted_seq
        case JobCompleted():
            return record.event.submitted_seq or record.seq - 2 * len(record.event.assets) - 1
    return None
