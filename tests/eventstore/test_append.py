"""Appending: what a decision saw still holds, or nothing is written; and no answer lost is a fact doubled."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import msgspec
import pytest
from nats.aio.client import Client

from factories import JOB, completed, job_id, meta, ready, started, stored, submitted
from forge import topology
from forge.broker import BrokerRefused, request
from forge.embedded import EmbeddedNats
from forge.errors import Conflict, LogUnavailable, LogUnreadable
from forge.events.catalogue import Event
from forge.eventstore import MAX_BATCH, Draft, EventStore
from processes import freeze, thaw

LEDGER = topology.admissions("mei")
FACTS = topology.job("mei", JOB)


def admission(number: int, expected: int | None = None, by: str = "") -> Draft:
    """Mei's ``number``-th submission, by one writer of several; expects where the ledger ends, if at all."""
    boundary = None if expected is None else LEDGER
    draft_meta = meta(f"submit {number}{by}")
    return Draft(submitted(job_id(number)), draft_meta, boundary, expected or 0)


def fact(event: Event, expected: int | None = None, command: str = "a command") -> Draft:
    return Draft(event, meta(command), None if expected is None else FACTS, expected or 0)


# -------------------------------------------------------------- one event


async def test_an_event_is_in_the_log_as_it_was_given(events: EventStore) -> None:
    [record] = await events.append([admission(1, expected=0)])
    assert record.seq == 1
    assert await events.at(1) == record
    assert await events.last(LEDGER) == record


async def test_a_decision_that_is_out_of_date_is_refused(events: EventStore) -> None:
    await events.append([admission(1, expected=0)])
    with pytest.raises(Conflict):
        await events.append([admission(2, expected=0)])
    assert await events.head() == 1
    [record] = await events.append([admission(2, expected=1)])
    assert record.seq == 2


async def test_other_boundaries_do_not_matter(events: EventStore) -> None:
    await events.append([admission(1, expected=0)])
    lin = Draft(submitted(job_id(2), "lin"), meta("lin's"), topology.admissions("lin"), 0)
    await events.append([lin])
    await events.append([admission(3, expected=1)])
    assert await events.head() == 3


async def test_a_filter_is_a_boundary_of_many_subjects(events: EventStore) -> None:
    await events.append([fact(started(), expected=0)])
    with pytest.raises(Conflict):
        await events.append([fact(completed(), expected=0, command="complete")])
    await events.append([fact(completed(), expected=1, command="complete")])


async def test_of_fifty_writers_at_once_one_wins(events: EventStore) -> None:
    attempts = [events.append([admission(nth, expected=0, by=f" by {nth}")]) for nth in range(1, 51)]
    answers = await asyncio.gather(*attempts, return_exceptions=True)
    won = [answer for answer in answers if isinstance(answer, list)]
    lost = [answer for answer in answers if isinstance(answer, Conflict)]
    assert (len(won), len(lost), await events.head()) == (1, 49, 1)


async def test_fifty_writers_who_decide_again_all_get_in_once(events: EventStore) -> None:
    async def insist(number: int) -> None:
        while True:
            last = await events.last(LEDGER)
            try:
                await events.append([admission(number, expected=last.seq if last else 0, by=f" by {number}")])
            except Conflict:
                continue
            return

    await asyncio.gather(*(insist(number) for number in range(1, 51)))
    found = [await events.at(seq) for seq in range(1, 51)]
    assert {record.event.job_id for record in found if record} == {job_id(n) for n in range(1, 51)}  # type: ignore[attr-defined]
    assert await events.head() == 50


# ------------------------------------------------------------------ batches


def conclusion(expected: int) -> list[Draft]:
    """The end of a job: its picture, its readiness, its completion; only the job's facts are expected."""
    made = [stored(), ready(), completed()]
    drafts = [Draft(event, meta("conclude", nth)) for nth, event in enumerate(made)]
    return [*drafts[:2], msgspec.structs.replace(drafts[2], boundary=FACTS, expected=expected)]


async def test_a_batch_stands_in_the_log_side_by_side_in_order(events: EventStore) -> None:
    records = await events.append([admission(1, expected=0), admission(2), admission(3)])
    assert [record.seq for record in records] == [1, 2, 3]
    assert [await events.at(seq) for seq in (1, 2, 3)] == records


async def test_a_batch_over_many_boundaries_is_written_whole(events: EventStore) -> None:
    await events.append([fact(started(), expected=0)])
    records = await events.append(conclusion(expected=1))
    assert [await events.at(record.seq) for record in records] == records


async def test_a_batch_is_written_whole_or_not_at_all(events: EventStore) -> None:
    await events.append([fact(started(), expected=0)])
    with pytest.raises(Conflict):
        await events.append(conclusion(expected=0))
    assert await events.head() == 1
    await events.append(conclusion(expected=1))
    assert await events.head() == 4


async def test_the_largest_batch_is_written(events: EventStore) -> None:
    drafts = [admission(nth, by="bulk") for nth in range(2, MAX_BATCH + 1)]
    records = await events.append([admission(1, expected=0, by="bulk"), *drafts])
    assert (records[-1].seq, await events.head()) == (MAX_BATCH, MAX_BATCH)


async def test_batches_at_once_do_not_mix(events: EventStore) -> None:
    async def one(user: str, first: int) -> list[int]:
        drafts = [
            Draft(submitted(job_id(first + nth), user), meta(f"{user} {nth}"), None) for nth in range(10)
        ]
        drafts[0] = msgspec.structs.replace(drafts[0], boundary=topology.admissions(user))
        return [record.seq for record in await events.append(drafts)]

    ranges = await asyncio.gather(*(one(f"user {n}", 100 * n + 1) for n in range(1, 11)))
    assert all(seqs == list(range(seqs[0], seqs[0] + 10)) for seqs in ranges)
    assert sorted(seq for seqs in ranges for seq in seqs) == list(range(1, 101))


# ------------------------------------------------------------- lost answers


@pytest.fixture(params=["one event", "a batch on one subject", "a batch on many"])
def drafts(request: pytest.FixtureRequest) -> list[Draft]:
    return {
        "one event": [admission(1, expected=0)],
        "a batch on one subject": [admission(1, expected=0), admission(2), admission(3)],
        "a batch on many": conclusion(expected=0),
    }[request.param]


@pytest.mark.fault("B2")
async def test_what_was_written_without_an_answer_is_recognised(
    events: EventStore, nats_server: EmbeddedNats, drafts: list[Draft]
) -> None:
    assert nats_server.process is not None
    await freeze(nats_server.process.pid)
    try:
        with pytest.raises(LogUnavailable):
            await events.append(drafts, within=0.3)
    finally:
        thaw(nats_server.process.pid)
    records = await events.append(drafts)
    assert await events.head() == len(drafts)
    assert [await events.at(record.seq) for record in records] == records


@pytest.mark.fault("B2")
async def test_what_was_written_before_is_not_written_again(events: EventStore, drafts: list[Draft]) -> None:
    once = await events.append(drafts)
    again = await events.append(drafts)
    assert again == once
    assert await events.head() == len(drafts)


async def test_a_batch_is_recognised_though_the_log_went_on(events: EventStore) -> None:
    """The session's ledger has moved on; the job's own last fact still tells."""
    once = await events.append(conclusion(expected=0))
    other = Draft(stored(job_id(2)), meta("other"), topology.session(None), once[0].seq)
    await events.append([other])
    assert await events.append(conclusion(expected=0)) == once


async def test_somebody_elses_event_is_never_taken_for_ones_own(events: EventStore) -> None:
    await events.append([admission(1, expected=0, by="me")])
    with pytest.raises(Conflict):
        await events.append([admission(1, expected=0, by="you")])


async def test_the_same_id_with_another_fact_is_not_ones_own(events: EventStore) -> None:
    mine = admission(1, expected=0)
    await events.append([mine])
    other = msgspec.structs.replace(mine, event=submitted(job_id(1), priority=1))
    with pytest.raises(Conflict):
        await events.append([other])


@pytest.mark.fault("K5")
async def test_an_append_outlives_a_server_that_is_killed(
    events: EventStore, nats_server: EmbeddedNats, drafts: list[Draft]
) -> None:
    nats_server.kill()
    appending = asyncio.create_task(events.append(drafts, within=20))
    nats_server.start()
    records = await appending
    assert await events.head() == len(drafts)
    assert [record.seq for record in records] == list(range(1, len(drafts) + 1))


async def test_without_a_server_everything_says_so_in_time(
    events: EventStore, nats_server: EmbeddedNats
) -> None:
    nats_server.kill()
    asked: list[Any] = [
        events.append([admission(1, expected=0)], within=0.3),
        events.load(LEDGER, timeout=0.3),
        events.at(1, timeout=0.3),
        events.last(LEDGER, timeout=0.3),
    ]
    async with asyncio.timeout(8):  # an append that is not told how long tries for ten
        answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(answer) for answer in answers] == [LogUnavailable] * 4


@pytest.mark.fault("B1")
async def test_a_full_log_refuses_in_the_servers_words(events: EventStore, nats_client: Client) -> None:
    info = msgspec.json.decode(await request(nats_client, "STREAM.INFO.FORGE_EVENTS"))
    await request(nats_client, "STREAM.UPDATE.FORGE_EVENTS", info["config"] | {"max_msgs": 1})
    await events.append([admission(1, expected=0)])
    with pytest.raises(BrokerRefused, match="10077"):
        await events.append([admission(2, expected=1)])


# ---------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "1 to 1000 events, not 0"),
        ([admission(n, 0 if n == 1 else None) for n in range(1, MAX_BATCH + 2)], "not 1001"),
        ([admission(1)], "at least one boundary"),
        ([admission(1, 0), admission(2, 1)], "only the first event of a boundary"),
        ([Draft(submitted(), meta(), topology.admissions("lin"))], "does not cover forge.evt.admission.mei"),
        ([Draft(started(), meta(), LEDGER)], "does not cover forge.evt.job.mei"),
        ([Draft(submitted(), meta(), "forge.evt.admission.me*")], "does not cover"),
        ([Draft(submitted(), meta(), "")], "does not cover"),
    ],
)
async def test_wrong_use_is_loud(events: EventStore, wrong: list[Draft], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        await events.append(wrong)
    assert await events.head() == 0


# ------------------------------------------------------------------ reading


async def test_a_boundary_holds_its_facts_in_order_and_where_it_ends(events: EventStore) -> None:
    assert (await events.load(FACTS)).seq == 0
    await events.append([admission(1, expected=0)])
    await events.append([fact(started(), expected=0)])
    await events.append(conclusion(expected=2))
    boundary = await events.load(FACTS)
    assert [record.event for record in boundary.events] == [started(), completed()]
    assert (boundary.filter, boundary.seq) == (FACTS, 5)


async def test_where_nothing_stands_nothing_is_found(events: EventStore) -> None:
    assert (await events.at(1), await events.last(LEDGER), await events.head()) == (None, None, 0)
    assert (await events.load(topology.job("mei", UUID(int=9)))).events == []


async def test_what_cannot_be_read_is_refused_by_its_sequence(
    events: EventStore, nats_client: Client
) -> None:
    await nats_client.request(f"forge.evt.job.mei.{JOB}.1.dreamt", b"not JSON", timeout=10)
    with pytest.raises(LogUnreadable, match="message 1"):
        await events.load(FACTS)
    with pytest.raises(LogUnreadable, match="message 1"):
        await events.at(1)
