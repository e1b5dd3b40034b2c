"""Snapshots: who begins with one goes on as if it had read everything; one that is not fit is not used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice

import msgspec
import pytest
from nats.aio.client import Client

from benchmarks import story
from endless import beside
from factories import KEY, Log, job_id, key_created, meta, submitted
from forge import database, snapshots
from forge.admissions import Admissions, AdmissionsState
from forge.api import live as reading
from forge.api.live import Live
from forge.database import Pool
from forge.domain.dispatch import Line
from forge.embedded import EmbeddedNats
from forge.events.envelope import Recorded
from forge.eventstore import Draft, EventStore
from forge.snapshots import Snapshots
from forge.topology import admissions as admissions_of
from forge.topology import key as facts_of
from forge.workers.dispatcher import Dispatcher, DispatcherState
from waiting import wait_until


def admissions_over(events: EventStore) -> Admissions:
    return Admissions(events, Line(), queue_limit=1000, rate_per_hour=100)


def folded(events: EventStore, records: Sequence[Recorded], made: Admissions | None = None) -> Admissions:
    made = made or admissions_over(events)
    for record in records:
        made.apply(record)
    return made


@pytest.mark.parametrize("cut", [0, 1, 3, 250, 1999])
async def test_a_fold_goes_on_from_its_state_as_if_it_had_read_all(events: EventStore, cut: int) -> None:
    log = Log()
    records = [log.add(event, at) for event, at in islice(story.events(), 2000)]
    state = msgspec.msgpack.encode(folded(events, records[:cut]).state())
    again = admissions_over(events)
    again.restore(msgspec.msgpack.decode(state, type=AdmissionsState))
    whole = folded(events, records)
    assert folded(events, records[cut:], again).state() == whole.state()
    assert again.line.order() == whole.line.order()
    assert again.line.pending == whole.line.pending


# ------------------------------------------------------------------ what is fit


async def written(events: EventStore, count: int) -> list[Recorded]:
    """Requests of users of their own."""
    made = list[Recorded]()
    for nth in range(1, count + 1):
        event = submitted(job_id(nth), user=f"user-{nth}")
        made += await events.append([Draft(event, meta(f"ask {nth}"), admissions_of(event.user_id), 0)])
    return made


async def kept(pool: Pool, events: EventStore, records: Sequence[Recorded]) -> Snapshots[list[str]]:
    made = Snapshots(pool, events, "a fold", list[str], 2)
    assert made.due(records[-1].seq)
    made.take(records[-1].seq, str(records[-1].meta.id), [r.subject for r in records])
    assert not made.due(records[-1].seq + 100)  # one at a time
    await wait_until(lambda: made.due(records[-1].seq + 2), what="the snapshot is kept")
    return made


async def test_the_newest_is_found_and_the_next_is_due_behind_it(pool: Pool, events: EventStore) -> None:
    records = await written(events, 3)
    await kept(pool, events, records[:2])
    await kept(pool, events, records)
    fresh = Snapshots(pool, events, "a fold", list[str], 2)
    found = await fresh.newest()
    assert found == snapshots.Snapshot(3, [r.subject for r in records])
    assert (fresh.due(4), fresh.due(5)) == (False, True)
    assert await Snapshots(pool, events, "another fold", list[str], 2).newest() is None


async def test_an_older_one_does_not_take_a_newer_ones_place(pool: Pool, events: EventStore) -> None:
    records = await written(events, 3)
    await kept(pool, events, records)
    late = await kept(pool, events, records[:2])
    found = await late.newest()
    assert found is not None
    assert found.seq == 3


async def test_of_other_rules_none_is_found(
    pool: Pool, events: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await kept(pool, events, await written(events, 2))
    monkeypatch.setattr(snapshots, "rules", lambda: bytes(32))
    assert await made.newest() is None


@pytest.mark.parametrize(
    "harm",
    [
        "update forge_log.snapshot set event = gen_random_uuid()::text",  # another log
        "update forge_log.snapshot set seq = 77",  # a longer log
        "update forge_log.snapshot set state = 'x'",
        "drop table forge_log.snapshot",
    ],
)
async def test_what_is_not_fit_is_not_used(pool: Pool, events: EventStore, harm: str) -> None:
    made = await kept(pool, events, await written(events, 2))
    assert await made.newest() is not None
    await pool.execute(harm)
    assert await made.newest() is None


async def test_without_postgres_there_is_none(events: EventStore) -> None:
    async with database.opened("postgresql://nobody@127.0.0.1:9/none") as pool:
        made = Snapshots(pool, events, "a fold", list[str], 2)
        assert await made.newest() is None
        made.take(2, "an id", [])
        await wait_until(lambda: made.due(4), what="it goes on without one")


async def test_with_0_none_is_taken_and_none_is_looked_for(pool: Pool, events: EventStore) -> None:
    await kept(pool, events, await written(events, 2))
    none = Snapshots(pool, events, "a fold", list[str], 0)
    assert not none.due(10**9)
    assert await none.newest() is None


# -------------------------------------------------------------- who begins with one


@asynccontextmanager
async def an_api(server: EmbeddedNats, pool: Pool) -> AsyncIterator[Live]:
    """An API's reader of the log that has caught up."""
    made: list[Live] = []

    async def run(nc: Client) -> None:
        made.append(Live(nc, admissions_over(EventStore(nc)), pool, snapshot_events=10))
        await made[0].run()

    async with beside(server, "api", run):
        await wait_until(lambda: bool(made) and made[0].admissions.caught_up.is_set(), what="it has read")
        yield made[0]


async def test_an_api_begins_with_one_and_knows_what_the_first_knew(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await events.append([Draft(key_created(), meta("a key"), facts_of(KEY), 0)])
    async with an_api(nats_server, pool) as first:
        await story.write(events.nc, 120, after=0)
        await wait_until(lambda: first.head == 121 and first.snapshots.due(10**6), what="it has taken one")
        knew, told = first.admissions.state(), first.since(0)
    taken_at = await pool.fetchval("select seq from forge_log.snapshot where of = 'admissions'")
    monkeypatch.setattr(reading, "REMEMBERED", 5)
    async with an_api(nats_server, pool) as second:
        assert second.floor >= taken_at - 5 > 0  # the first was due behind ten
        assert second.admissions.state() == knew
        assert second.keys.good(KEY)
        assert [t.record.seq for t in second.since(second.floor)] == [
            t.record.seq for t in told if t.record.seq > second.floor
        ]


async def test_a_dispatcher_begins_with_one_and_knows_what_the_first_knew(
    nats_server: EmbeddedNats, pool: Pool, events: EventStore
) -> None:
    made: list[Dispatcher] = []

    async def run(nc: Client) -> None:
        store = EventStore(nc)
        made.append(Dispatcher(store, Snapshots(pool, store, "dispatcher", DispatcherState, 10)))
        await made[-1].run()

    await written(events, 30)
    async with beside(nats_server, "dispatcher", run):
        await wait_until(lambda: bool(made) and len(made[0].orders) == 3, what="it gives orders")
        taken_at = "select seq = 30 from forge_log.snapshot where of = 'dispatcher'"
        await wait_until(lambda: pool.fetchval(taken_at), what="it has taken a snapshot of all")
    async with beside(nats_server, "dispatcher", run):
        await wait_until(lambda: len(made) == 2 and len(made[1].orders) == 3, what="it gives orders")
        assert made[1].line.state() == made[0].line.state()
