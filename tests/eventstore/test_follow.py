"""Following: nothing missed, nothing twice, in order, whatever becomes of the server meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

import damage
from factories import job_id, meta, sampled, started, submitted
from forge import follower, topology
from forge.broker import request
from forge.embedded import EmbeddedNats
from forge.errors import LogDamaged, LogUnavailable, LogUnreadable
from forge.events.envelope import Recorded, headers
from forge.eventstore import Draft, EventStore
from forge.follower import follow
from waiting import wait_until


class Reader:
    """Follows in the background and keeps what it was handed."""

    def __init__(self, task: asyncio.Task[None], records: list[Recorded], caught_up: list[bool]) -> None:
        self.task, self.records, self.caught_up = task, records, caught_up

    @property
    def seqs(self) -> list[int]:
        return [record.seq for record in self.records]

    async def reaches(self, seq: int) -> None:
        await wait_until(lambda: self.task.done() or seq in self.seqs[-1:], 60, f"reading reaches {seq}")
        assert not self.task.done(), self.task.exception()


@asynccontextmanager
async def following(nc: Client, start: int = 1, most: int = 1000, **options: object) -> AsyncIterator[Reader]:
    records: list[Recorded] = []
    caught_up: list[bool] = []

    async def read() -> None:
        async with aclosing(follow(nc, start, most=most, **options)) as batches:  # type: ignore[arg-type]
            async for batch in batches:
                assert len(batch.records) <= most
                records.extend(batch.records)
                caught_up.append(batch.caught_up)

    task = asyncio.create_task(read())
    try:
        yield Reader(task, records, caught_up)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's silence is noticed within a second."""
    monkeypatch.setattr(follower, "_HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(follower, "_SILENT_SECONDS", 0.9)
    monkeypatch.setattr(follower, "_STALLED_SECONDS", 0.9)


async def write(events: EventStore, count: int, user: str = "mei", at_once: int = 500) -> int:
    """Append ``count`` submissions of a user, some at once; returns the last sequence."""
    seq = await ledger(events, user)
    for begun in range(0, count, at_once):
        numbers = range(begun, min(begun + at_once, count))
        some = [Draft(submitted(job_id(n), user), meta(f"{user} {seq} {n}")) for n in numbers]
        some[0] = msgspec.structs.replace(some[0], boundary=topology.admissions(user), expected=seq)
        seq = (await events.append(some, within=60))[-1].seq
    return seq


async def go_on_writing(events: EventStore, enough: asyncio.Event) -> int:
    """Append until it is enough, and once more; returns the last sequence."""
    while not enough.is_set():
        await write(events, 50, at_once=10)
    return await write(events, 50, at_once=10)


async def ledger(events: EventStore, user: str) -> int:
    """Where a user's ledger ends; asks again while the server is away."""
    while True:
        with contextlib.suppress(LogUnavailable):
            last = await events.last(topology.admissions(user), timeout=0.3)
            return last.seq if last else 0


# ------------------------------------------------------------------ reading


async def test_an_empty_log_is_caught_up_with_at_once(nats_client: Client) -> None:
    async with aclosing(follow(nats_client, 1)) as batches:
        batch = await asyncio.wait_for(anext(batches), 30)
    assert (batch.records, batch.caught_up) == ([], True)


async def test_what_was_there_comes_first_then_what_is_new(nats_client: Client, events: EventStore) -> None:
    await write(events, 5)
    async with following(nats_client) as reader:
        await reader.reaches(5)
        assert reader.caught_up[-1]
        for nth in range(6, 9):
            await write(events, 1)
            await reader.reaches(nth)
    assert reader.seqs == list(range(1, 9))


@pytest.mark.parametrize("start", [1, 2500, 3000, 3001])
async def test_a_long_log_is_read_from_any_point(nats_client: Client, events: EventStore, start: int) -> None:
    await write(events, 3000)
    async with following(nats_client, start, most=170) as reader:
        await wait_until(lambda: any(reader.caught_up), 60)
        assert reader.seqs == list(range(start, 3001))
        assert reader.caught_up.index(True) == len(reader.caught_up) - 1


async def test_a_filter_leaves_the_rest_out(nats_client: Client, events: EventStore) -> None:
    await write(events, 3)
    fact = Draft(started(), meta("start"), topology.job("mei", started().job_id))
    await events.append([fact])
    await write(events, 2)
    async with following(nats_client, filters=(topology.ALL_JOB_FACTS,)) as reader:
        await wait_until(lambda: any(reader.caught_up))
        assert reader.seqs == [4]


async def test_samples_are_followed_on_their_own_stream(nats_client: Client) -> None:
    where = topology.subject(sampled())
    body = msgspec.json.encode(sampled())
    await nats_client.request(where, body, headers=headers(sampled(), meta(), where), timeout=10)
    async with following(nats_client, stream=topology.METRICS, filters=(topology.ALL_METRICS,)) as reader:
        await reader.reaches(1)
    assert reader.records[0].event == sampled()


async def test_a_reader_that_is_slow_gets_everything(nats_client: Client, events: EventStore) -> None:
    await write(events, 3000)
    found: list[int] = []
    async with aclosing(follow(nats_client, 1, most=37)) as batches:
        async for batch in batches:
            await asyncio.sleep(0)
            found += [record.seq for record in batch.records]
            if batch.caught_up:
                break
    assert found == list(range(1, 3001))


async def test_requests_that_expire_unused_are_made_again(
    nats_client: Client, events: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "_EXPIRES_SECONDS", 0.5)
    asked: list[int] = []
    ask = follower._Reader._ask

    async def counted(self: follower._Reader) -> None:
        asked.append(self.credit)
        await ask(self)

    monkeypatch.setattr(follower._Reader, "_ask", counted)
    async with following(nats_client) as reader:
        await wait_until(lambda: len(asked) > 3, what="three requests have expired")
        assert set(asked) == {0}, "what an expired request had left is asked for again"
        await reader.reaches(await write(events, 1200))
    assert reader.seqs == list(range(1, 1201))


# ------------------------------------------------------------------ failures


@pytest.mark.parametrize("how", ["restarted", "killed"])
async def test_a_server_that_goes_and_comes_is_read_on(
    nats_server: EmbeddedNats, nats_client: Client, events: EventStore, how: str
) -> None:
    async with following(nats_client) as reader:
        for _ in range(3):
            read, enough = len(reader.seqs), asyncio.Event()
            writing = asyncio.create_task(go_on_writing(events, enough))
            await wait_until(lambda read=read: len(reader.seqs) > read, what="some were read")  # type: ignore[misc]  # a default
            nats_server.kill() if how == "killed" else nats_server.stop()
            nats_server.start()
            enough.set()
            last = await writing
        await reader.reaches(last)
    assert reader.seqs == list(range(1, last + 1))
    found = [await events.at(seq) for seq in (1, last)]
    assert found == [reader.records[0], reader.records[-1]]


async def test_a_consumer_that_is_deleted_is_made_again(nats_client: Client, events: EventStore) -> None:
    async with following(nats_client) as reader:
        await reader.reaches(await write(events, 2))
        names = msgspec.json.decode(await request(nats_client, "CONSUMER.NAMES.FORGE_EVENTS"))["consumers"]
        [mine] = [name for name in names if name.startswith("follow-")]
        await request(nats_client, f"CONSUMER.DELETE.FORGE_EVENTS.{mine}")
        await reader.reaches(await write(events, 2))
    assert reader.seqs == [1, 2, 3, 4]


async def test_nothing_is_left_behind(
    nats_server: EmbeddedNats, nats_client: Client, events: EventStore
) -> None:
    await write(events, 1)  # the connection's own subscription for answers exists from now on
    before = len(nats_client._subs)
    async with following(nats_client) as reader:
        await reader.reaches(1)
        for _ in range(3):
            nats_server.kill()
            nats_server.start()
            await reader.reaches(await write(events, 1))
        assert len(nats_client._subs) == before + 1
    assert len(nats_client._subs) == before

    async def only_ours() -> bool:
        names = await request(nats_client, "CONSUMER.NAMES.FORGE_EVENTS")
        return msgspec.json.decode(names)["consumers"] == ["cleanup"]  # type: ignore[no-any-return]

    await wait_until(only_ours, what="the reader's own consumer is gone")


async def test_what_listened_goes_though_the_server_is_away(
    nats_server: EmbeddedNats, nats_client: Client, events: EventStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise each outage would leave one more subscription, for as long as the process lives."""
    await write(events, 1)
    before = len(nats_client._subs)
    async with following(nats_client) as reader:
        await reader.reaches(1)
        nats_server.kill()
        await wait_until(lambda: "is interrupted" in caplog.text, what="the reader has given up")
        assert len(nats_client._subs) == before
        nats_server.start()
        await reader.reaches(await write(events, 1))
        assert len(nats_client._subs) == before + 1


@pytest.mark.fault("B3")
async def test_what_cannot_be_read_stops_reading_right_before_it(
    nats_client: Client, events: EventStore
) -> None:
    await write(events, 3)
    await nats_client.request("forge.evt.admission.mallory", b"\x00", timeout=10)
    await write(events, 3)
    async with following(nats_client) as reader:
        await asyncio.wait([reader.task], timeout=30)
        assert isinstance(reader.task.exception(), LogUnreadable)
        assert "message 4" in str(reader.task.exception())
    assert reader.seqs == [1, 2, 3]


# -------------------------------------------------------------------- damage


async def ends_damaged(reader: Reader) -> str:
    """Why it ended."""
    await asyncio.wait([reader.task], timeout=30)
    error = reader.task.exception()
    assert isinstance(error, LogDamaged), error
    return error.detail


async def remade(nc: Client) -> None:
    """Another log of the same name."""
    await request(nc, "STREAM.DELETE.FORGE_EVENTS")
    await topology.apply(nc)


async def test_a_log_that_comes_back_shorter_is_not_read_on(
    nats_server: EmbeddedNats, nats_client: Client, events: EventStore
) -> None:
    async with following(nats_client) as reader:
        await reader.reaches(await write(events, 5))
        await remade(nats_client)
        assert "ends at event 0, and event 5 was read" in await ends_damaged(reader)


async def test_a_log_that_comes_back_as_another_is_not_read_on(
    nats_client: Client, events: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the reader's own subjects were looked at, and it is longer than before."""
    made, still_there = asyncio.Event(), follower._still_there

    async def later(*given: Any) -> None:  # half made it would be one that is shorter
        await made.wait()
        await still_there(*given)

    monkeypatch.setattr(follower, "_still_there", later)
    async with following(nats_client, filters=(topology.ALL_ADMISSIONS,)) as reader:
        await reader.reaches(await write(events, 5))
        config = msgspec.json.decode(await request(nats_client, "STREAM.INFO.FORGE_EVENTS"))["config"]
        await request(nats_client, "STREAM.DELETE.FORGE_EVENTS")
        aside = {**config, "subjects": ["aside.>"], "allow_direct": False}
        await request(nats_client, "STREAM.CREATE.FORGE_EVENTS", aside)
        for _ in range(7):
            await nats_client.request("aside.x", b"{}", headers={"ce-id": "another"}, timeout=10)
        await request(nats_client, "STREAM.UPDATE.FORGE_EVENTS", {**config, "subjects": config["subjects"]})
        made.set()
        assert "another log: its event 5" in await ends_damaged(reader)


async def test_a_skipped_event_is_noticed_by_who_reads_the_whole_log(
    nats_server: EmbeddedNats, nats_client: Client, events: EventStore
) -> None:
    """The server leaves out a message whose bytes changed, and says nothing."""
    await write(events, 9)
    nats_server.stop()
    damage.flip(nats_server, str(meta("mei 0 4").id).encode())
    nats_server.start()
    async with following(nats_client) as reader:
        assert "event 6 comes right after event 4" in await ends_damaged(reader)
    assert reader.seqs == [1, 2, 3, 4]


@pytest.mark.parametrize("read", [0, 2], ids=["the first", "the last"])
async def test_deliveries_that_got_lost_are_read_again(
    nats_client: Client, events: EventStore, monkeypatch: pytest.MonkeyPatch, read: int
) -> None:
    """As with a connection that broke in the moment, and nothing comes behind them that would tell."""
    real, seen = follower._Reader._on_message, 0

    async def losing(reader: follower._Reader, message: Msg) -> None:
        nonlocal seen
        delivery = not (message.headers or {}).get("Status")
        seen += delivery
        if not delivery or not read < seen <= 5:
            await real(reader, message)

    monkeypatch.setattr(follower._Reader, "_on_message", losing)
    await write(events, read)
    async with following(nats_client) as reader:
        await wait_until(lambda: len(reader.seqs) == read, 10, "the beginning is read")
        await write(events, 5 - read)
        await reader.reaches(5)
    assert reader.seqs == [1, 2, 3, 4, 5]


async def test_an_event_that_does_not_come_is_asked_for(
    nats_server: EmbeddedNats, nats_client: Client, events: EventStore
) -> None:
    """Of a damaged last message a consumer is told that it is due, for ever."""
    await write(events, 9)
    nats_server.stop()
    damage.flip(nats_server, str(meta("mei 0 8").id).encode())
    nats_server.start()
    async with following(nats_client) as reader:
        assert "the event after 8 can not be read" in await ends_damaged(reader)
    assert reader.seqs == list(range(1, 9))
