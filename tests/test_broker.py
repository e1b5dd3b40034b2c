"""The connection: bounded in time, refused in the server's words, and never deaf to a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from nats.aio.client import Client

from factories import submitted
from forge import broker, topology
from forge.broker import BrokerRefused, connect, exchange, request
from forge.embedded import EmbeddedNats
from forge.errors import LogUnavailable
from forge.eventstore import EventStore

LEDGER = topology.subject(submitted())


async def test_nobody_at_the_address_is_said_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "CONNECT_SECONDS", 0.3)
    with pytest.raises(LogUnavailable, match=r"nats://127.0.0.1:9 does not answer"):
        await connect("nats://127.0.0.1:9", "test")


async def test_a_refusal_has_the_servers_words_and_number(nats_client: Client) -> None:
    with pytest.raises(BrokerRefused, match=r"stream not found \(JetStream error 10059\)") as refused:
        await request(nats_client, "STREAM.INFO.NOWHERE")
    assert refused.value.err_code == 10059


async def test_nobody_who_listens_is_said_at_once(nats_client: Client) -> None:
    async with asyncio.timeout(2):
        with pytest.raises(LogUnavailable, match="no answer on"):
            await exchange(nats_client, "nobody.is.here", b"", None, 10)


async def test_a_connection_heals_itself_and_its_end_is_told(nats_server: EmbeddedNats) -> None:
    ended = asyncio.Event()

    async def on_closed() -> None:
        ended.set()
        raise RuntimeError("a callback that raises must not do harm")

    nc = await connect(nats_server.url, "test", on_closed=on_closed)
    nats_server.kill()
    nats_server.start()
    async with asyncio.timeout(10):
        while True:
            try:
                await request(nc, "INFO", timeout=0.2)
            except LogUnavailable:
                continue
            break
    assert not ended.is_set()
    await nc.close()
    assert ended.is_set()


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
        done, _ = await asyncio.wait({task}, timeout=2)
        assert done, f"cancelled after {turns} turns, it goes on"


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
