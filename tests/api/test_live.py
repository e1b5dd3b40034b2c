"""Live events: in order, resumable, only one's own, bounded, and ended politely."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from api.making import completed, started
from api.serving import Serve, Served
from forge import topology
from forge.api import sockets
from forge.domain.rates import Rate
from forge.settings import ApiKey, Settings
from waiting import wait_until

ICON = {"job_type": "ui_icon", "params": {}}


@asynccontextmanager
async def listening(
    served: Served, user: str | None = "mei", *, query: str = "", v1: bool = False, **headers: str
) -> AsyncIterator[ClientConnection]:
    sent = headers | ({} if user is None else {"X-Forge-User": user})
    async with connect(
        served.socket_url + query,
        additional_headers=sent,
        subprotocols=["forge.v1"] if v1 else None,  # type: ignore[list-item]
        compression=None,
    ) as socket:
        yield socket


async def hear(socket: ClientConnection, kind: str | None = None) -> dict[str, Any]:
    """The next message, of one kind if it matters which."""
    async with asyncio.timeout(30):
        while True:
            message: dict[str, Any] = json.loads(await socket.recv())
            if kind is None or message["t"] == kind:
                return message


async def hear_events(socket: ClientConnection, count: int) -> list[dict[str, Any]]:
    return [await hear(socket, "ev") for _ in range(count)]


async def code_of(socket: ClientConnection) -> int:
    """What the socket is closed with, after everything that comes before."""
    async with asyncio.timeout(30):
        with suppress(ConnectionClosed):
            while True:
                await socket.recv()
    assert socket.close_code is not None
    return socket.close_code


async def submit(client: httpx.AsyncClient, count: int = 1) -> list[dict[str, Any]]:
    answers = [await client.post("/jobs", json=ICON) for _ in range(count)]
    return [answer.json() for answer in answers]


async def crowd(client: httpx.AsyncClient, count: int, first: int = 0) -> list[dict[str, Any]]:
    """So many jobs, of as many users as may have them."""
    return [
        (await client.post("/jobs", json=ICON, headers={"X-Forge-User": f"user-{nth // 10}"})).json()
        for nth in range(first, first + count)
    ]


async def test_the_welcome_introduces_the_log(served: Served, mei: httpx.AsyncClient) -> None:
    await submit(mei, 2)
    async with listening(served) as socket:
        welcome = await hear(socket)
        assert set(welcome) == {"t", "v", "conn", "epoch", "head", "mark_ms", "max_lag"}
        assert (welcome["t"], welcome["v"], welcome["max_lag"]) == ("welcome", 1, 5000)
        assert await hear(socket) == {"t": "mark", "seq": welcome["head"]}
    async with listening(served) as other:
        again = await hear(other)
        assert (again["epoch"], again["conn"] != welcome["conn"]) == (welcome["epoch"], True)


async def test_a_simple_client_hears_what_happens_from_now_on(served: Served, mei: httpx.AsyncClient) -> None:
    await submit(mei)
    async with listening(served) as socket:
        await hear(socket, "mark")
        [job] = await submit(mei)
        event = await hear(socket, "ev")
        assert set(event) == {"t", "seq", "type", "key", "at", "data"}
        assert (event["type"], event["key"], event["seq"]) == ("job.submitted", job["id"], job["seq"])
        assert event["data"]["user_id"] == "mei"
        await completed(served.parts, "mei", job)
        types = [event["type"] for event in await hear_events(socket, 4)]
        assert types == ["job.started", "asset.stored", "asset.ready", "job.completed"]


async def test_an_event_brings_the_trace_it_is_part_of(served: Served, mei: httpx.AsyncClient) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with listening(served) as socket:
        await hear(socket, "mark")
        await mei.post("/jobs", json=ICON, headers={"traceparent": trace})
        assert (await hear(socket, "ev"))["traceparent"] == trace


async def test_after_in_the_address_gives_what_was_missed(served: Served, mei: httpx.AsyncClient) -> None:
    jobs = await submit(mei, 5)
    async with listening(served, query="?after=0") as socket:
        assert [e["key"] for e in await hear_events(socket, 5)] == [job["id"] for job in jobs]
    async with listening(served, query=f"?after={jobs[2]['seq']}") as socket:
        assert [e["key"] for e in await hear_events(socket, 2)] == [job["id"] for job in jobs[3:]]
        assert await hear(socket) == {"t": "mark", "seq": jobs[-1]["seq"]}
    for bad in ("x", "-1", "9" * 30):
        async with listening(served, query=f"?after={bad}") as socket:
            assert await code_of(socket) == sockets.MALFORMED


async def test_nothing_is_lost_or_doubled_over_many_reconnects(
    served: Served, mei: httpx.AsyncClient
) -> None:
    heard: list[int] = []
    writing = asyncio.create_task(crowd(mei, 60))
    position = 0
    while len(heard) < 60:
        async with listening(served, None, query=f"?after={position}") as socket:
            for _ in range(min(7, 60 - len(heard))):
                event = await hear(socket, "ev")
                position = event["seq"]
                heard.append(position)
    assert heard == [job["seq"] for job in await writing]


async def test_a_v1_client_says_where_to_begin_and_what_it_wants(
    served: Served, mei: httpx.AsyncClient
) -> None:
    jobs = await submit(mei, 3)
    await completed(served.parts, "mei", jobs[0])
    async with listening(served, v1=True) as socket:
        assert socket.subprotocol == "forge.v1"
        welcome = await hear(socket)
        await socket.send(
            json.dumps({"t": "sub", "epoch": welcome["epoch"], "after": 0, "topics": ["assets"]})
        )
        assert [e["type"] for e in await hear_events(socket, 2)] == ["asset.stored", "asset.ready"]
        assert (await hear(socket))["t"] == "mark"
        await socket.send(json.dumps({"t": "sub", "after": jobs[1]["seq"], "topics": ["jobs"]}))
        types = [e["type"] for e in await hear_events(socket, 3)]
        assert types == ["job.submitted", "job.started", "job.completed"]


async def test_another_log_or_too_far_behind_begins_anew(
    served: Served, mei: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.api.live.REMEMBERED", 3)
    jobs = await submit(mei, 6)
    await wait_until(lambda: served.parts.live.head == jobs[-1]["seq"])
    head = jobs[-1]["seq"]
    async with listening(served, v1=True) as socket:
        welcome = await hear(socket)
        for sub, reason in (
            ({"epoch": "another", "after": head}, "epoch"),
            ({"after": head + 100}, "epoch"),
            ({"after": jobs[1]["seq"]}, "behind"),
        ):
            await socket.send(json.dumps({"t": "sub", "epoch": welcome["epoch"]} | sub))
            assert await hear(socket, "reset") == {"t": "reset", "reason": reason, "head": head}
        await socket.send(json.dumps({"t": "sub", "after": jobs[2]["seq"]}))
        assert [e["key"] for e in await hear_events(socket, 3)] == [job["id"] for job in jobs[3:]]


async def test_everybody_hears_of_their_own_things_only(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    async with (
        listening(served, "mei") as hers,
        listening(served, "lan") as his,
        listening(served, None) as all_,
    ):
        for socket in (hers, his, all_):
            await hear(socket, "mark")
        [one], [two] = await submit(mei), await submit(lan)
        assert (await hear(hers, "ev"))["key"] == one["id"]
        assert (await hear(his, "ev"))["key"] == two["id"]
        assert [e["key"] for e in await hear_events(all_, 2)] == [one["id"], two["id"]]
        await progress(served, "mei", one["id"], 3)
        assert (await hear(hers, "live"))["key"] == one["id"]
        await progress(served, "lan", two["id"], 4)
        assert (await hear(his, "live"))["key"] == two["id"], "the first progress he hears of is his own"


async def progress(served: Served, user: str, job_id: str, value: int) -> None:
    told = {"job_id": job_id, "user_id": user, "value": value, "max": 20, "node": "3", "attempt": 1}
    await served.parts.nc.publish(topology.progress(job_id), msgspec.json.encode(told))  # type: ignore[arg-type]


async def test_progress_is_told_and_nonsense_is_not(served: Served, mei: httpx.AsyncClient) -> None:
    [job] = await submit(mei)
    await started(served.parts, "mei", job)
    async with listening(served) as socket:
        await hear(socket, "mark")
        await served.parts.nc.publish(topology.progress(job["id"]), b"\xff")
        await progress(served, "mei", job["id"], 7)
        live = await hear(socket, "live")
        data = {"value": 7, "max": 20, "node": "3", "attempt": 1}
        assert live == {"t": "live", "key": job["id"], "kind": "progress", "data": data}


@pytest.mark.parametrize(
    "message",
    ["", "[]", "{", '{"t":"drop"}', '{"t":"sub","after":-1}', '{"t":"sub","topics":["x"]}', "[" * 9000],
)
async def test_a_client_that_talks_nonsense_is_let_go(served: Served, message: str) -> None:
    async with listening(served) as socket:
        await socket.send(message)
        assert await code_of(socket) == sockets.MALFORMED


async def test_a_client_that_says_nothing_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "MARK_SECONDS", 0.05)
    async with listening(served, v1=True) as socket:
        assert await code_of(socket) == sockets.MALFORMED


async def test_marks_come_by_time_even_while_others_are_busy(
    served: Served, lan: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MARK_SECONDS", 0.1)
    async with listening(served, "mei") as socket:
        first = await hear(socket, "mark")
        writing = asyncio.create_task(crowd(lan, 100))
        marks = [(await hear(socket))["seq"] for _ in range(5)]
        assert marks == sorted(marks)
        jobs = await writing
        while (await hear(socket, "mark"))["seq"] < jobs[-1]["seq"]:
            pass
        assert first["seq"] < jobs[0]["seq"]


async def test_a_slow_reader_is_let_go_and_holds_up_nobody(
    served: Served, mei: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.api.live.REMEMBERED", 20)
    slow, blocked = asyncio.Event(), asyncio.Event()
    plain = sockets.Conversation._send_text

    async def send(self: sockets.Conversation, text: str) -> None:
        if self.caller.user == "mei" and '"t":"ev"' in text:
            blocked.set()
            await slow.wait()
        await plain(self, text)

    monkeypatch.setattr(sockets.Conversation, "_send_text", send)
    async with listening(served, "mei") as socket, listening(served, None) as quick:
        await hear(quick, "mark")
        await hear(socket, "mark")
        await submit(mei)
        await blocked.wait()
        await hear(quick, "ev")
        jobs = []
        for nth in range(40):  # who hears of each before the next one is quick, however slow all are
            jobs += await crowd(mei, 1, nth)
            await hear(quick, "ev")
        await wait_until(lambda: served.parts.live.floor >= jobs[10]["seq"])
        slow.set()
        assert await code_of(socket) == sockets.TOO_SLOW


async def test_a_socket_needs_a_key_too(serve: Serve, settings: Settings) -> None:
    keys = (ApiKey("player", "mei", "s3cret"),)
    served = await serve(with_settings=msgspec.structs.replace(settings, api_keys=keys))
    async with listening(served, None) as socket:
        assert await hear(socket) == {"t": "bye", "code": 4401, "retry_after_ms": 0}
        assert await code_of(socket) == 4401
    async with listening(served, "lan", Authorization="Bearer s3cret") as socket:
        assert await code_of(socket) == 4403
    async with listening(served, None, Authorization="Bearer s3cret") as socket:
        assert (await hear(socket))["t"] == "welcome"


# ---------------------------------------------------- tickets, seats, rights


KEYS = (ApiKey("player", "mei", "s3cret"), ApiKey("player", "lan", "s4cret"))


@pytest.fixture
async def locked(serve: Serve, settings: Settings) -> Served:
    return await serve(with_settings=msgspec.structs.replace(settings, api_keys=KEYS))


async def ticket_of(served: Served, key: str | None = "s3cret", user: str | None = None) -> str:
    async with served.client(user, key) as client:
        answer = await client.post("/events/ticket")
        assert answer.status_code == 201
        assert answer.headers["cache-control"] == "no-store"
        assert set(answer.json()) == {"ticket", "expires_at"}
        ticket: str = answer.json()["ticket"]
        return ticket


@asynccontextmanager
async def with_ticket(served: Served, ticket: str, **headers: str) -> AsyncIterator[ClientConnection]:
    protocols: Any = ["forge.v1", f"ticket.{ticket}"]
    async with connect(
        served.socket_url, subprotocols=protocols, additional_headers=headers, compression=None
    ) as socket:
        yield socket


async def test_a_ticket_opens_one_socket_for_whom_it_was_given_to(
    locked: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = await ticket_of(locked)
    async with with_ticket(locked, ticket) as socket:
        assert socket.subprotocol == "forge.v1"
        assert (await hear(socket))["t"] == "welcome"
        async with locked.client(key="s4cret") as lan, locked.client(key="s3cret") as mei:
            await lan.post("/jobs", json=ICON)
            hers = (await mei.post("/jobs", json=ICON)).json()
        await socket.send(json.dumps({"t": "sub", "after": 0}))
        assert (await hear(socket, "ev"))["key"] == hers["id"]
    for bad in (ticket, "x", f"{ticket}x", "a.b", ".", "", "x" * 500, "forge.v1"):
        async with with_ticket(locked, bad or "-") as socket:
            assert await code_of(socket) in (4401, 1013), bad
    monkeypatch.setattr("forge.api.tickets.LIFE_SECONDS", -1.0)
    async with with_ticket(locked, await ticket_of(locked)) as socket:
        assert await code_of(socket) == 4401


async def test_a_ticket_is_good_at_every_api_process_and_once_in_all(
    serve: Serve, settings: Settings
) -> None:
    keyed = msgspec.structs.replace(settings, api_keys=KEYS)
    one, two = await serve(with_settings=keyed), await serve(with_settings=keyed, projecting=False)
    ticket = await ticket_of(one)
    async with with_ticket(two, ticket) as socket:
        assert (await hear(socket))["t"] == "welcome"
    for served in (one, two):
        async with with_ticket(served, ticket) as socket:
            assert await code_of(socket) == 4401
    async with with_ticket(two, "0123456789abcdef.nobody-gave-it") as socket:
        assert await code_of(socket) == 1013, "whoever gave it is gone; a new one will do"


async def test_a_ticket_needs_a_key_and_says_who_it_is_for(locked: Served, served: Served) -> None:
    async with locked.client() as nobody:
        assert (await nobody.post("/events/ticket")).status_code == 401
    async with served.client() as client:
        foreign = {"Origin": "https://evil.example"}
        assert (await client.post("/events/ticket", headers=foreign)).status_code == 401
    async with with_ticket(served, await ticket_of(served, None, "mei"), **{"X-Forge-User": "lan"}) as socket:
        assert (await hear(socket))["t"] == "welcome"
        async with served.client("lan") as lan, served.client("mei") as mei:
            await lan.post("/jobs", json=ICON)
            hers = (await mei.post("/jobs", json=ICON)).json()
        await socket.send(json.dumps({"t": "sub", "after": 0}))
        assert (await hear(socket, "ev"))["key"] == hers["id"], "the ticket says who, not the header"


async def test_a_page_of_elsewhere_gets_no_socket_even_with_a_ticket(locked: Served) -> None:
    async with with_ticket(locked, await ticket_of(locked), Origin="https://evil.example") as socket:
        assert await code_of(socket) == 4403
    async with with_ticket(locked, await ticket_of(locked), Origin=locked.base_url) as socket:
        assert (await hear(socket))["t"] == "welcome"


async def test_a_user_has_four_sockets_and_there_is_an_end_for_all(serve: Serve, settings: Settings) -> None:
    served = await serve(with_settings=msgspec.structs.replace(settings, sockets=6))
    async with AsyncExitStack() as open_:
        for user in ("mei", "mei", "mei", "mei", "lan"):
            await hear(await open_.enter_async_context(listening(served, user)), "mark")
        async with listening(served, "mei") as fifth:
            assert (await hear(fifth, "bye"))["code"] == 4429
            assert await code_of(fifth) == 4429
        async with listening(served, "lan") as sixth:
            await hear(sixth, "mark")
            async with listening(served, "li") as seventh:
                assert await code_of(seventh) == 1013
    await wait_until(lambda: not served.parts.live.listeners)
    async with listening(served, "mei") as again:
        await hear(again, "mark")


async def test_who_loses_the_right_loses_the_socket(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "RIGHTS_SECONDS", 0.05)
    gone: set[str] = set()
    monkeypatch.setattr("forge.api.auth.Door.lets_stay", lambda self, caller: caller.user not in gone)
    async with listening(served, "mei") as hers, listening(served, "lan") as his:
        await hear(hers, "mark")
        await hear(his, "mark")
        gone.add("mei")
        assert (await hear(hers, "bye"))["code"] == 4401
        assert await code_of(hers) == 4401
        await his.send('{"t": "sub"}')
        await hear(his, "mark")


async def test_a_message_is_not_heeded_without_the_right(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(served) as socket:
        await hear(socket, "mark")
        monkeypatch.setattr("forge.api.auth.Door.lets_stay", lambda self, caller: False)
        await socket.send('{"t": "sub", "after": 0}')
        assert await code_of(socket) == 4401


async def test_a_client_that_talks_too_much_is_let_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MESSAGES", Rate(per_second=0.001, burst=20))
    async with listening(served) as socket:
        with suppress(ConnectionClosed):
            for _ in range(sockets.MESSAGES.burst + 10):
                await socket.send('{"t": "sub"}')
        assert await code_of(socket) == 4429


async def test_messages_have_a_size_and_are_text(served: Served) -> None:
    for message, code in (("x" * 16 * 1024, 1008), ("x" * (16 * 1024 + 1), 1009), (b"{}", 1008)):
        async with listening(served) as socket:
            await hear(socket, "mark")
            await socket.send(message)
            assert await code_of(socket) == code, code


async def test_who_reads_nothing_is_let_go(
    served: Served, lan: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: it stops reading, and what it is sent piles up until the server has had enough."""
    monkeypatch.setattr(sockets, "SEND_SECONDS", 0.3)
    monkeypatch.setattr("forge.api.connections.STALLED_SECONDS", 0.6)
    async with listening(served, "mei") as socket:
        await hear(socket, "mark")
        socket.transport.pause_reading()
        [job] = await submit(lan)
        news = b'{"job_id":"%s","user_id":"mei","value":1,"max":2,"attempt":1,"node":"%s"}'

        async def let_go() -> bool:
            long = news % (job["id"].encode(), b"x" * 500_000)
            await served.parts.nc.publish(topology.progress(job["id"]), long)
            return not served.parts.live.listeners

        await wait_until(let_go, interval=0.02)
        socket.transport.abort()  # it would wait for a goodbye that it does not read


async def test_a_page_of_elsewhere_gets_no_socket(served: Served) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1.evil.example"):
        async with listening(served, Origin=origin) as socket:
            assert await code_of(socket) == 4403, origin


async def test_stopping_says_goodbye_and_when_to_come_again(served: Served) -> None:
    async with listening(served) as socket:
        await hear(socket, "mark")
        served.parts.live.close()
        assert await hear(socket) == {"t": "bye", "code": 1012, "retry_after_ms": 1000}
        assert await code_of(socket) == 1012
    assert served.parts.live.listeners == set()
    async with listening(served) as late:
        assert await code_of(late) == 1012


async def test_a_client_that_vanishes_leaves_nothing_behind(served: Served, mei: httpx.AsyncClient) -> None:
    async with listening(served) as socket:
        await hear(socket, "mark")
        assert len(served.parts.live.listeners) == 1
        socket.transport.abort()
        await submit(mei, 3)
        await wait_until(lambda: not served.parts.live.listeners)
