"""Fetches are counted without a write each, told to the log in time, and never twice."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import msgspec
import pytest
from nats.aio.client import Client

from api.making import completed, started
from api.serving import Served
from factories import NOW
from forge.api import reads
from forge.api.reads import ReadCounter
from forge.embedded import EmbeddedNats
from forge.events.assets import AssetsAccessed
from forge.events.envelope import Recorded
from forge.eventstore import EventStore
from forge.follower import follow
from waiting import wait_until

ASSET = UUID(int=7)


async def told(nc: Client) -> list[Recorded]:
    """Every event about fetches."""
    found: list[Recorded] = []
    async for batch in follow(nc, 1, ("forge.evt.access.>",)):
        found += batch.records
        if batch.caught_up:
            return found
    raise AssertionError("the log has an end")


def counted(records: list[Recorded]) -> dict[tuple[UUID, str], int]:
    total: dict[tuple[UUID, str], int] = {}
    for record in records:
        assert isinstance(record.event, AssetsAccessed)
        for read in record.event.reads:
            key = read.asset_id, read.user_id
            total[key] = total.get(key, 0) + read.count
    return total


def fetch(counter: ReadCounter, times: int = 1, asset: UUID = ASSET, user: str = "mei") -> None:
    for nth in range(times):
        counter.count(asset, user, NOW + timedelta(seconds=nth))


async def an_asset(served: Served, mei: httpx.AsyncClient) -> dict[str, Any]:
    job = (await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})).json()
    loaded = await completed(served.parts, "mei", job)
    served.parts.live.wrote(loaded.seq)
    [asset] = (await mei.get("/assets", params={"min_seq": loaded.seq})).json()["items"]
    found: dict[str, Any] = asset
    return found


# ------------------------------------------------------------------ over HTTP


async def test_what_was_fetched_is_known_after_one_flush(
    served: Served, mei: httpx.AsyncClient, operator: httpx.AsyncClient, nats_client: Client
) -> None:
    asset = await an_asset(served, mei)
    path = f"/assets/{asset['id']}"
    head = await served.parts.store.head()
    for client, place, headers in (
        (mei, "/file", {}),
        (mei, "/file", {"Range": "bytes=0-9"}),
        (mei, "/file", {"If-None-Match": f'"{asset["content_hash"]}"'}),
        (mei, "/thumbnail", {}),
        (operator, "/thumbnail?width=64", {}),
    ):
        assert (await client.get(path + place, headers=headers)).status_code in (200, 206, 304)
    assert await served.parts.store.head() == head, "no write for a read"
    await served.parts.reads.flush()
    assert await served.parts.store.head() == head + 1, "one for all of them"
    now = {"min_seq": head + 1}
    everybodys = (await operator.get(path, params=now)).json()
    assert (everybodys["access_count"], everybodys["seq"]) == (5, head + 1)
    own = (await mei.get(path, params=now)).json()
    assert (own["access_count"], own["seq"]) == (4, head + 1)
    assert own["expires_at"] == asset["expires_at"], "looking makes nothing live longer"
    users = (await operator.get(f"{path}/usage")).json()["items"]
    assert {(u["user_id"], u["reads"]) for u in users} == {("mei", 4), ("dev", 1)}
    [me] = (await mei.get(f"{path}/usage")).json()["items"]
    assert (me["user_id"], me["last_at"]) == ("mei", own["last_accessed_at"])
    assert me["first_at"] <= me["last_at"]


async def test_only_bytes_that_were_sent_count(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient, nats_client: Client
) -> None:
    asset = await an_asset(served, mei)
    path = f"/assets/{asset['id']}"
    await mei.head(f"{path}/file")
    await mei.head(f"{path}/thumbnail")
    await mei.get(path)
    await mei.get(f"{path}/history")
    assert (await lan.get(f"{path}/file")).status_code == 404
    assert (await mei.get(f"{path}/file", headers={"Range": "bytes=99999999-"})).status_code == 416
    served.parts.blobs.path(asset["content_hash"], "png").unlink()
    assert (await mei.get(f"{path}/file")).status_code == 503
    await served.parts.reads.flush()
    assert await told(nats_client) == []


# ----------------------------------------------------------------- the counter


async def test_many_fetches_are_few_events_of_bounded_length(
    events: EventStore, nats_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads, "MOST_IN_EVENT", 3)
    monkeypatch.setattr(reads, "MOST_KEPT", 7)
    counter = ReadCounter(events, "one")
    for _ in range(100):
        for user in range(9):
            fetch(counter, user=f"user-{user}")
    assert counter.uncounted == 200
    await counter.flush()
    records = await told(nats_client)
    assert [len(r.event.reads) for r in records] == [3, 3, 1]  # type: ignore[attr-defined]
    assert counted(records) == {(ASSET, f"user-{n}"): 100 for n in range(7)}
    fetch(counter, user="user-8")
    await counter.flush()
    assert counted(await told(nats_client))[ASSET, "user-8"] == 1


async def test_nothing_to_tell_is_nothing_told(events: EventStore, nats_client: Client) -> None:
    await ReadCounter(events, "one").flush()
    assert await told(nats_client) == []


async def test_counts_wait_for_a_log_that_is_away(
    events: EventStore, nats_client: Client, nats_server: EmbeddedNats, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = ReadCounter(events, "one")
    fetch(counter, 2)
    await counter.flush()
    nats_server.kill()
    monkeypatch.setattr(reads, "_WRITE_SECONDS", 0.5)
    fetch(counter, 3)
    await counter.flush()
    fetch(counter, 4)
    await counter.flush()
    nats_server.start()
    while counter._unwritten or counter._counts:
        await counter.flush()
    assert counted(await told(nats_client)) == {(ASSET, "mei"): 9}


@pytest.mark.parametrize("company", [False, True], ids=["alone", "beside another of its name"])
async def test_a_lost_answer_counts_once(events: EventStore, nats_client: Client, company: bool) -> None:
    counter, other = ReadCounter(events, "one"), ReadCounter(events, "one")
    fetch(counter)
    await counter.flush()
    fetch(counter, 5)
    draft = counter._draft()
    counter._unwritten = draft  # and its answer never came, though the log has it:
    await events.append([msgspec.structs.replace(draft, expected=counter._seen or 0)])
    if company:
        fetch(other, user="lan")
        await other.flush()
    fetch(counter, 2)
    await counter.flush()
    records = await told(nats_client)
    assert counted(records)[ASSET, "mei"] == 8
    assert len({record.meta.id for record in records}) == len(records)


async def test_two_apis_of_one_name_and_one_after_the_other_all_count(
    events: EventStore, nats_client: Client
) -> None:
    for _ in range(2):
        counters = [ReadCounter(events, "one") for _ in range(3)]
        for counter in counters:
            fetch(counter, 2)
        await asyncio.gather(*(counter.flush() for counter in counters))
        for counter in counters:
            while counter._unwritten or counter._counts:
                await counter.flush()
    assert counted(await told(nats_client)) == {(ASSET, "mei"): 12}


async def test_it_flushes_by_time_and_once_more_at_the_end(events: EventStore, nats_client: Client) -> None:
    counter = ReadCounter(events, "one")
    async with counter.flushing(0.05):
        fetch(counter)
        await wait_until(lambda: told(nats_client), what="the pace has come round")
    counter = ReadCounter(events, "two")
    async with counter.flushing(3600):
        fetch(counter, 3)
    assert counted(await told(nats_client)) == {(ASSET, "mei"): 4}


async def test_others_are_told_nothing_of_it(served: Served, mei: httpx.AsyncClient) -> None:
    """Who fetched what is in the log that sockets are fed from."""
    asset = await an_asset(served, mei)
    await mei.get(f"/assets/{asset['id']}/file")
    await served.parts.reads.flush()
    job = (await mei.post("/jobs", json={"job_type": "ui_icon", "params": {}})).json()
    await started(served.parts, "mei", job)
    live = served.parts.live
    head = await served.parts.store.head()
    await wait_until(lambda: live.head >= head, what="the API has read it all")
    assert not [told for told in live.since(0) if isinstance(told.record.event, AssetsAccessed)]
