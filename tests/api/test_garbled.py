"""Wrong bytes in what NATS and Postgres say: as if they were away for a moment; nothing wrong is written."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import msgspec
import pytest
from nats.aio.client import Client

from acceptance.links import Address, Link
from api.serving import Serve
from endless import beside
from factories import job_id, meta, submitted
from forge import logbook
from forge.broker import connect
from forge.database import Pool
from forge.embedded import EmbeddedNats
from forge.errors import LogUnavailable
from forge.events.envelope import Recorded
from forge.eventstore import Draft, EventStore
from forge.follower import follow
from forge.projections import reading
from forge.settings import Settings
from forge.topology import ALL_EVENTS, admissions
from forge.workers import archivist
from waiting import wait_until

COUNT = 8
CARD = {"job_type": "fate_card", "params": {"prompt": "a crane above the clouds"}}


class Behind(EmbeddedNats):
    """The server behind a link."""

    def __init__(self, link: Link) -> None:
        self.link = link

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.link.port}"


def draft(nth: int) -> Draft:
    user = f"u{nth}"
    return Draft(submitted(job_id(nth), user), meta(user), admissions(user))


async def copied(pool: Pool, seq: int) -> bool:
    return (await pool.fetchval("select max(seq) from forge_log.entry") or 0) >= seq


@asynccontextmanager
async def spoilt(server: Address, path: Path | None = None) -> AsyncIterator[Link]:
    link = Link(lambda: server)
    await link.listen(path)
    try:
        yield link
    finally:
        await link.close()


@pytest.mark.fault("N1")
async def test_rows_that_arrive_garbled_are_not_the_clients_fault(
    serve: Serve, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SECONDS", 0.9)  # what a wrong length keeps waiting ends then
    socket = Path(parse_qs(urlsplit(settings.postgres_dsn).query)["host"][0]) / ".s.PGSQL.5432"
    async with spoilt(Address(path=socket), tmp_path / socket.name) as link:
        dsn = settings.postgres_dsn.split("?")[0] + f"?host={quote(str(tmp_path), safe='')}"
        served = await serve(with_settings=msgspec.structs.replace(settings, postgres_dsn=dsn))
        async with served.client("mei") as mei:
            asked = (await mei.post("/batch", json={"jobs": [CARD] * 8})).json()
            whole = (await mei.get("/queue", params={"min_seq": asked["seq"]})).json()
            told = Counter[int]()
            for nth in range(1, 34):
                if nth > 17:  # while it connects, too
                    link.reset()
                    link.long = 200
                link.corrupt, link.spot = 1, nth % 17 / 17
                told[(await mei.get("/queue")).status_code] += 1
            link.heal()
            assert told.keys() <= {200, 503}, told
            assert told[503] > 20, told
            await wait_until(partial(tells, mei, whole), what="everything is told again")


async def tells(client: httpx.AsyncClient, whole: object) -> bool:
    return bool((await client.get("/queue")).json() == whole)


@pytest.mark.fault("N1")
async def test_a_garbled_answer_of_the_log_is_no_answer(
    nats_server: EmbeddedNats, nats_client: Client
) -> None:
    async with spoilt(Address(nats_server.port or 0)) as link:
        link.long = 20
        nc = await connect(f"nats://127.0.0.1:{link.port}", "spoilt")
        for nth in range(1, COUNT + 1):
            link.corrupt, link.spot = 1, nth / (COUNT + 1)
            assert await appended(EventStore(nc), draft(nth), link) == nth
        await nc.close()
    assert await EventStore(nats_client).head() == COUNT


async def appended(store: EventStore, draft: Draft, link: Link) -> int:
    """Where it stands, when it was said until it was answered."""
    while True:
        try:
            [record] = await store.append([draft], within=0.5)
        except LogUnavailable:
            link.heal()
        else:
            return record.seq


@pytest.mark.fault("N1")
async def test_the_second_copy_takes_nothing_garbled(
    nats_server: EmbeddedNats, events: EventStore, pool: Pool
) -> None:
    async with (
        spoilt(Address(nats_server.port or 0)) as link,
        beside(Behind(link), "archivist", lambda nc: archivist.run(nc, pool)) as copying,
    ):
        link.long = 500
        for nth in range(1, COUNT + 1):
            link.corrupt, link.spot = 1, nth / (COUNT + 1)
            await events.append([draft(nth)])
            await wait_until(partial(copied, pool, nth), 60, f"event {nth} is copied")
            assert not link.corrupt
        assert not copying.done()
    async with pool.acquire() as connection:
        assert (await logbook.verify(events, connection)).copied == COUNT


@pytest.mark.fault("N1")
async def test_an_event_that_arrives_garbled_is_read_once_more(
    nats_server: EmbeddedNats, events: EventStore
) -> None:
    few = 3  # so that all of them come at once
    for nth in range(1, few + 1):
        await events.append([draft(nth)])
    async with spoilt(Address(nats_server.port or 0)) as link:
        link.long = 1500
        nc = await connect(f"nats://127.0.0.1:{link.port}", "spoilt")
        for spot in range(5, 100, 10):
            link.corrupt, link.spot = 1, spot / 100
            while link.corrupt:  # until they came in one piece
                found = list[Recorded]()
                async with aclosing(follow(nc, 1)) as batches:
                    while len(found) < few:
                        found += (await anext(batches)).records
                assert [record.seq for record in found] == list(range(1, few + 1))
        await nc.close()


@pytest.mark.fault("N1")
async def test_what_a_decision_reads_garbled_is_read_once_more(
    nats_server: EmbeddedNats, events: EventStore
) -> None:
    for nth in range(1, COUNT + 1):
        await events.append([draft(nth)])
    whole = await events.load(ALL_EVENTS)
    async with spoilt(Address(nats_server.port or 0)) as link:
        link.long = 500
        store = EventStore(await connect(f"nats://127.0.0.1:{link.port}", "spoilt"))
        for spot in range(2, 100, 7):
            link.spot = spot / 100
            for read, due in (
                (lambda: store.load(ALL_EVENTS, timeout=0.5), whole),
                (lambda: store.at(1, timeout=0.5), whole.events[0]),
            ):
                link.corrupt = 1
                while link.corrupt:  # an answer that comes too late is none
                    # which is told, with a 503 and when to come again
                    with contextlib.suppress(LogUnavailable):
                        assert await read() == due
        await store.nc.close()
