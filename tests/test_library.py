"""Counting in and giving up, on a real log: exact with many at once, done once however often it is said."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from factories import after, deleted, expired, job_id, meta, stored, submitted
from forge.commands import Jobs, Loaded
from forge.domain.jobs import Complete, Start, Status
from forge.domain.limits import MAX_CHARACTER_ASSETS, MAX_SESSION_BYTES
from forge.errors import LimitReached
from forge.events.catalogue import Event
from forge.eventstore import Draft, EventStore
from forge.library import NOTHING, Library
from forge.topology import ALL_EVENTS, admissions, reference


async def running(events: EventStore, number: int) -> Loaded:
    """The test's so-manieth job, at work."""
    request = submitted(job_id(number), user=f"user-{number}")
    where = admissions(request.user_id)
    [record] = await events.append([Draft(request, meta(f"submit {number}"), where, 0)])
    jobs = Jobs(events)
    loaded = await jobs.load(request.user_id, request.job_id, record.seq)
    return await jobs.act(loaded, Start(1, "w", "b", "r"), actor="w", name="start")


async def conclude(events: EventStore, loaded: Loaded, **picture: Any) -> Loaded:
    job = loaded.job
    pictures = [stored(job.id, job.user_id, f"{job.id.int % 10_000:064x}", **picture)]
    complete = Complete(1, "w", (), after(9))
    before = partial(Library(events).entries, pictures)
    return await Jobs(events).act(loaded, complete, actor="w", name="complete", before=before)


async def conclude_all(events: EventStore, count: int, **picture: Any) -> list[Loaded | BaseException]:
    """So many jobs, all concluded at the same moment."""
    at_work = [await running(events, number + 1) for number in range(count)]
    return await asyncio.gather(
        *(conclude(events, loaded, **picture) for loaded in at_work), return_exceptions=True
    )


async def holding(events: EventStore, event: Event, boundary: str) -> None:
    """A ledger that has come this far."""
    await events.append([Draft(event, meta("so far"), boundary, 0)])


def outcomes(answers: list[Loaded | BaseException]) -> tuple[int, int]:
    done = sum(isinstance(answer, Loaded) for answer in answers)
    refused = sum(isinstance(answer, LimitReached) for answer in answers)
    assert done + refused == len(answers), answers
    return done, refused


async def test_a_session_is_filled_to_the_last_byte_by_many_at_once(events: EventStore) -> None:
    full = stored(session_id="s", session_bytes=MAX_SESSION_BYTES - 500)
    await holding(events, full, "forge.evt.session.s")
    answers = await conclude_all(events, 8, session_id="s", file_size_bytes=100)
    assert outcomes(answers) == (5, 3)
    assert (await Library(events).held_by_session("s")).amount == MAX_SESSION_BYTES


async def test_a_character_gets_its_hundredth_asset_and_no_more_by_many_at_once(events: EventStore) -> None:
    almost = deleted(character_id="c", character_assets=MAX_CHARACTER_ASSETS - 3)
    await holding(events, almost, "forge.evt.asset.c.>")
    answers = await conclude_all(events, 8, character_id="c")
    assert outcomes(answers) == (3, 5)
    assert (await Library(events).held_by_character("c")).amount == MAX_CHARACTER_ASSETS


async def test_a_refused_conclusion_writes_nothing(events: EventStore) -> None:
    await holding(events, stored(session_id="s", session_bytes=MAX_SESSION_BYTES), "forge.evt.session.s")
    loaded = await running(events, 1)
    head = await events.head()
    with pytest.raises(LimitReached):
        await conclude(events, loaded, session_id="s", character_id="c")
    assert await events.head() == head
    assert await Library(events).held_by_character("c") == NOTHING


async def test_what_is_given_up_makes_room(events: EventStore) -> None:
    library = Library(events)
    done = await conclude(events, await running(events, 1), session_id="s", character_id="c")
    assert done.job.status is Status.COMPLETED
    gone = deleted(
        done.job.id,
        done.job.user_id,
        f"{done.job.id.int % 10_000:064x}",
        session_id="s",
        character_id="c",
        file_size_bytes=1200,
    )
    await library.give_up(gone, actor="mei")
    assert (await library.held_by_session("s")).amount == 0
    assert (await library.held_by_character("c")).amount == 0


@pytest.mark.parametrize("owned", [{}, {"session_id": "s"}, {"character_id": "c"}], ids=str)
async def test_a_reference_is_given_up_once_by_many_at_once(
    events: EventStore, owned: dict[str, str]
) -> None:
    library = Library(events)
    await events.append(
        [Draft(stored(**owned), meta("store"), f"forge.evt.session.{owned.get('session_id', '-')}", 0)]
    )
    seqs = await asyncio.gather(
        *(library.give_up(deleted(**owned), actor="mei") for _ in range(5)),
        *(library.give_up(expired(**owned), actor="scheduler") for _ in range(5)),
    )
    assert len(set(seqs)) == 1
    mine = await events.load(
        reference(owned.get("character_id"), "npc_bust", deleted().asset_id, deleted().job_id)
    )
    assert len(mine.events) == 1


async def test_two_jobs_references_are_two(events: EventStore) -> None:
    library = Library(events)
    seqs = [await library.give_up(deleted(job_id(number)), actor="mei") for number in (1, 2)]
    assert len(set(seqs)) == 2
    assert len((await events.load(ALL_EVENTS)).events) == 2
