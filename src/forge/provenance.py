"""What the log tells of a job, or of an asset from its first picture on: for histories, to draw it again.

Nothing here knows Postgres: an asset that expired years ago is found as one of today. The server looks
through the subjects of all assets for it, so whoever asks sets a bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from uuid import UUID

from forge import chronicle
from forge.commands import SUBMIT_SECONDS, Jobs, Loaded
from forge.errors import NotFound
from forge.events.assets import (
    AssetFault,
    AssetGivenUp,
    AssetReady,
    AssetsAccessed,
    AssetStored,
    SessionReleased,
)
from forge.events.envelope import Recorded
from forge.eventstore import EventStore
from forge.topology import ALL_ACCESSES, admissions, faults, job, pins_of_anybody, references

_AT_ONCE = 64


async def facts(store: EventStore, asset_id: UUID) -> list[Recorded]:
    """Everything that was written about an asset, in order, whoever's it was; nothing of one that never was.

    Raises:
        LogUnreadable: an event cannot be decoded.
        LogUnavailable: no answer.
    """
    filters = (references(asset_id), pins_of_anybody(asset_id), faults(asset_id))
    found = {record.seq: record for record in await _all(store, 1, filters)}
    # a ready stands right behind its stored, what was released right behind the giving up
    beside = [r.seq - 1 for r in found.values() if isinstance(r.event, AssetReady)]
    beside += [r.seq + 1 for r in found.values() if isinstance(r.event, AssetGivenUp) and r.event.session_id]
    for nth in range(0, len(beside), _AT_ONCE):
        for record in await asyncio.gather(*map(store.at, beside[nth : nth + _AT_ONCE])):
            if record is not None and _is_of(record, asset_id):
                found[record.seq] = record
    return [found[seq] for seq in sorted(found)]


async def of_job(
    store: EventStore, job_id: UUID, user: str, submitted_seq: int, admitted_seq: int
) -> list[Recorded]:
    """A job's events: its request, its own facts, and where it was retried what the user's ledger says.

    Raises:
        LogUnreadable: an event cannot be decoded.
        LogUnavailable: no answer.
    """
    request = await store.at(submitted_seq, timeout=SUBMIT_SECONDS)
    filters = [job(user, job_id)]
    if admitted_seq != submitted_seq:
        filters.append(admissions(user))
    found = await _all(store, submitted_seq + 1, filters)
    mine = [record for record in found if getattr(record.event, "job_id", None) == job_id]
    return mine if request is None else [request, *mine]


async def accesses(store: EventStore, asset_id: UUID, since: int) -> list[Recorded]:
    """How an asset was fetched since an event of the log; each event holds the reads of this asset only."""
    found = []
    for record in await _all(store, since, (ALL_ACCESSES,)):
        assert isinstance(record.event, AssetsAccessed)
        mine = [read for read in record.event.reads if read.asset_id == asset_id]
        if mine:
            event = AssetsAccessed(source=record.event.source, reads=mine)
            found.append(Recorded(record.seq, record.subject, record.meta, event))
    return found


def visible(records: Sequence[Recorded], may_see: Callable[[str], bool]) -> list[Recorded]:
    """What somebody may know of an asset's facts: those of references of theirs, and what was found of the
    file while they had one."""
    held: set[UUID] = set()
    seen: list[Recorded] = []
    for record in records:
        event = record.event
        if isinstance(event, AssetFault):
            seen += [record] if held else []
        elif may_see(getattr(event, "user_id", "")):
            seen.append(record)
            if isinstance(event, AssetReady):
                held.add(event.job_id)
            elif isinstance(event, AssetGivenUp):
                held.discard(event.job_id)
    return seen


async def origin(
    jobs: Jobs, records: Sequence[Recorded], *, timeout: float = 2.0
) -> tuple[AssetStored, Loaded]:
    """The newest storing among an asset's facts, and the job it came of.

    Raises:
        NotFound: there is none.
        LogUnavailable: no answer.
    """
    stored = next((r.event for r in reversed(records) if isinstance(r.event, AssetStored)), None)
    if stored is None:
        raise NotFound("there is no such asset")
    seq = await jobs.submitted_seq(stored.user_id, stored.job_id, timeout=timeout)
    if seq is None:
        raise NotFound(f"there is no job {stored.job_id}")
    return stored, await jobs.load(stored.user_id, stored.job_id, seq, timeout=timeout)


async def _all(store: EventStore, start: int, filters: Sequence[str]) -> list[Recorded]:
    found: list[Recorded] = []
    async with aclosing(chronicle.records(store, start, filters)) as batches:
        async for batch in batches:
            found += batch.records
            if batch.caught_up:
                break
    return found


def _is_of(record: Recorded, asset_id: UUID) -> bool:
    event = record.event
    return isinstance(event, AssetStored | SessionReleased) and event.asset_id == asset_id
