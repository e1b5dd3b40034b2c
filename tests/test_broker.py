"""The connection: bounded in time, refused in the server's words, and never deaf to a cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from factories import submitted
from forge import broker, topology
from forge.broker import BrokerRefused, connect, exchange, request
from forge.embedded import EmbeddedNats
from forge.errors import LogUnavailable
from forge.eventstore import EventStore
from waiting import wait_until

LEDGER = topology.subject(submitted())


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "forge.broker"]


async def test_nobody_at_the_address_is_said_by_address_and_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(broker, "CONNECT_SECONDS", 1.0)
    caplog.set_level(logging.INFO)
    with pytest.raises(LogUnavailable, match=r"nats://127.0.0.1:9 does not answer"):
        await connect("nats://127.0.0.1:9", "test")
    assert said(caplog) == ["nats error"]
    assert caplog.records[0].levelno == logging.INFO, "commands show warnings"


async def test_a_refusal_has_the_servers_words_and_number(nats_client: Client) -> None:
    with pytest.raises(BrokerRefused, match=r"stream not found \(JetStream error 10059\)") as refused:
        await request(nats_client, "STREAM.INFO.NOWHERE")
    assert refused.value.err_code == 10059


async def test_nobody_who_listens_is_said_at_once(nats_client: Client) -> None:
    async with asyncio.timeout(30):
        with pytest.raises(LogUnavailable, match="no answer on"):
            await exchange(nats_client, "nobody.is.here", b"", None, 3600)


async def test_a_connection_heals_itself_and_its_end_is_told(nats_server: EmbeddedNats) -> None:
    ended = asyncio.Event()

    async def on_closed() -> None:
        ended.set()
        raise RuntimeError("a callback that raises must not do harm")

    nc = await connect(nats_server.url, "test", on_closed=on_closed)
    nats_server.kill()
    nats_server.start()
    async with asyncio.timeout(60):
        while True:
            try:
                await request(nc, "INFO", timeout=0.2)
            except LogUnavailable:
                continue
            break
    assert not ended.is_set()
    await nc.close()
    assert ended.is_set()


async def test_what_a_server_ends_a_connection_for_is_told(
    nats_server: EmbeddedNats, caplog: pytest.LogCaptureFixture
) -> None:
    ended = asyncio.Event()

    async def on_closed() -> None:
        ended.set()

    nc = await connect(nats_server.url, "test", on_closed=on_closed)
    nc._transport.write(b"no word of the protocol\r\n")
    async with asyncio.timeout(30):
        await ended.wait()
    [told] = [record for record in caplog.records if record.message == "nats error"]
    assert "Unknown Protocol Operation".lower() in told.error.lower()


async def test_a_server_that_is_away_is_mentioned_once_and_so_is_its_return(
    nats_server: EmbeddedNats, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    nc = await connect(nats_server.url, "test")
    for _ in range(2):
        nats_server.kill()
        await wait_until(lambda: nc._current_server.reconnects > 3, what="it tried again and again")
        nats_server.start()
        await wait_until(lambda: said(caplog)[-1] == "connected to nats again", what="its return is told")
    await nc.close()
    away = [record.__dict__["error"] for record in caplog.records if record.getMessage() == "nats error"]
    assert sum("ConnectionRefused" in error for error in away) == 2, away
    assert {record.__dict__["as"] for record in caplog.records if record.name == "forge.broker"} == {"test"}


@pytest.mark.parametrize("wait", ["request", "at", "load"])
async def test_no_cancellation_is_lost(nats_client: Client, events: EventStore, wait: str) -> None:
    """It may come in the very moment of the answer: the turns of the loop before it are tried one by one."""
    waits: dict[str, Callable[[], Awaitable[object]]] = {
        "request": lambda: request(nats_client, "INFO"),
        "at": lambda: events.at(1),
        "load": lambda: events.load(LEDGER),
    }

    async def endless() -> None:
        while True:
            await waits[wait]()

    for turns in range(60):
        task = asyncio.create_task(endless())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=30)
        assert done, f"cancelled after {turns} turns, it goes on"


async def test_each_is_answered_what_it_asked_and_a_late_answer_is_nobodys(nats_client: Client) -> None:
    late = list[Msg]()

    async def echo(message: Msg) -> None:
        if message.data == b"in vain":
            late.append(message)
            return
        for forgotten in late:
            await forgotten.respond(b"too late")
        await message.respond(message.data)

    await nats_client.subscribe("test.echo", cb=echo)
    with pytest.raises(LogUnavailable, match="no answer on"):
        await exchange(nats_client, "test.echo", b"in vain", None, 0.05)
    await wait_until(lambda: late, what="it was heard, and not answered")
    asked = [str(nth).encode() for nth in range(50)]
    answers = [exchange(nats_client, "test.echo", body, {"ce-id": "1"}, 30) for body in asked]
    assert await asyncio.gather(*answers) == asked


@pytest.mark.parametrize(
    "headers",
    [
        {"ce-id": "1", "ce-actor": "player:雪", "empty": ""},
        {"ce-actor": "player:x\r\nce-type: forge.job.completed.v1", "ce-id": "1"},
        {"ce-actor": "player:x\rce-type: y", "ce-id": "1\n2"},
        {},
    ],
)
async def test_headers_arrive_as_nats_py_sends_them(nats_client: Client, headers: dict[str, str]) -> None:
    """Whatever a value holds, it makes no header of its own."""
    sub = await nats_client.subscribe("test.headers")
    await nats_client.publish("test.headers", b"body", headers=headers)
    await Client._send_publish(nats_client, "test.headers", "", b"body", 4, headers)
    mine, theirs = [await sub.next_msg(timeout=30) for _ in range(2)]
    assert (mine.headers, mine.data) == (theirs.headers, theirs.data)


@pytest.mark.parametrize(
    "raw",
    [
        b"ce-id: 1\r\nce-time: 2026-05-01T12:00:00Z\r\nce-actor: player:\xe9\x9b\xaa\r\n\r\n",
        b"Nats-Sequence: 7\r\nNats-Subject: a.b\r\n\r\n",
        b"name:value\r\nother:\tvalue \r\n\r\n",
        b"no colon\r\nx: y: z\r\n",
        b"empty: \r\n\r\n",
        b"",
    ],
)
def test_headers_are_read_as_nats_py_reads_them(raw: bytes) -> None:
    assert broker._Client._parse_header_lines(raw) == Client._parse_header_lines(raw)
