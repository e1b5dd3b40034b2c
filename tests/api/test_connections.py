"""What a client can do to a connection: be slow, be endless, be silent, be no HTTP at all."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from api.raw import Answer, Line, ask, line
from api.serving import ROOT, Serve, Served
from forge.api import connections
from forge.api.app import create_app
from forge.api.gate import Gate
from forge.api.serving import serve
from forge.errors import ServerFailed
from waiting import wait_until

POST = b"POST %s/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n" % ROOT.encode()
BODY = b'{"job_type": "ui_icon", "params": {}}'


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.3)


def is_problem(answer: Answer, status: int, code: str) -> None:
    assert answer.status == status, answer
    assert answer.type == "application/problem+json"
    assert json.loads(answer.body)["code"] == code
    assert answer.headers["connection"] == "close"


async def drip(connection: Line, piece: bytes) -> None:
    """A piece again and again, until the other side has had enough."""
    try:
        while True:
            await connection.say(piece)
            await asyncio.sleep(0.02)
    except OSError:
        pass


async def dripping(base_url: str, begin: bytes, piece: bytes) -> Answer:
    async with line(base_url) as connection:
        if begin:
            await connection.say(begin)
        sending = asyncio.create_task(drip(connection, piece))
        try:
            return await connection.answer()
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


@pytest.mark.usefixtures("hasty")
async def test_a_request_must_arrive_in_time(served: Served) -> None:
    url = served.base_url
    is_problem(await dripping(url, b"GET /livez HTTP/1.1\r\nx: ", b"a"), 408, "too_slow")
    is_problem(await dripping(url, b"GET /li", b"v"), 408, "too_slow")
    is_problem(await dripping(url, POST + b"Content-Length: 9000\r\n\r\n", b" "), 408, "too_slow")
    is_problem(
        await dripping(url, POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"), 408, "too_slow"
    )


async def test_who_goes_on_behind_the_answer_is_let_go(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 1.0)  # enough to be answered in
    assert (await dripping(served.base_url, POST + b"Content-Length: 90000\r\n\r\n", b" ")).status == 413
    async with line(served.base_url) as connection:  # answered, but the body it announced never comes
        await connection.say(b"GET /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert (await connection.answer()).status == 404


@pytest.mark.usefixtures("hasty")
async def test_who_says_nothing_is_let_go(served: Served) -> None:
    async with line(served.base_url) as connection:
        assert await connection.answer() == Answer()
    assert await dripping(served.base_url, b"", b"\r\n") == Answer()


async def test_a_body_that_breaks_off_leaves_nothing(served: Served, mei: httpx.AsyncClient) -> None:
    async with line(served.base_url) as connection:
        await connection.say(POST + b"Content-Length: 100\r\n\r\n" + BODY)
    assert (await mei.get("/queue")).json()["items"] == []


async def test_a_large_upload_may_take_longer(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.3)
    monkeypatch.setattr(connections, "SLOWEST_BYTES", 100)  # each 100 bytes are good for a second
    async with line(served.base_url) as connection:
        await connection.say(POST + b"Content-Length: 1037\r\nConnection: close\r\n\r\n" + b" " * 1000)
        await asyncio.sleep(0.6)  # twice what a small one is given
        await connection.say(BODY)
        assert (await connection.answer()).status == 202


async def test_what_never_ends_is_cut_off(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    url = served.base_url
    for begin in (b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10):
        is_problem(await dripping(url, begin, b"a" * 20_000), 431, "head_too_large")
    monkeypatch.setattr(connections, "MAX_REQUEST", 300_000)
    endless = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"4000\r\n" + b"a" * 0x4000 + b"\r\n"
    assert (await dripping(url, endless, chunk)).status == 404
    trailing = POST + b"Transfer-Encoding: chunked\r\n\r\n25\r\n" + BODY + b"\r\n0\r\nx: "
    is_problem(await dripping(url, trailing, b"a" * 50_000), 413, "too_large")


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"G\x00T / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n broken\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_told_so(served: Served, nonsense: bytes) -> None:
    async with line(served.base_url) as connection:
        await connection.say(nonsense)
        is_problem(await connection.answer(), 400, "malformed")


async def test_what_trails_a_body_is_no_header(served: Served) -> None:
    """A proxy has checked the headers; what comes behind the body was not among them."""
    head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with line(served.base_url) as connection:
        await connection.say(head)
        await asyncio.sleep(0)
        await connection.say(b"25\r\n" + BODY + b"\r\n0\r\nX-Forge-User: mei\r\n\r\n")
        assert json.loads((await connection.answer()).body)["user_id"] == "dev"


async def test_requests_in_a_row_are_answered_in_a_row(served: Served) -> None:
    async with line(served.base_url) as connection:
        get = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
        await connection.say((get + b"\r\n") * 20 + get + b"Connection: close\r\n\r\n")
        async with asyncio.timeout(30):
            assert (await connection.reader.read(-1)).count(b"ok\n") == 21


@pytest.mark.usefixtures("hasty")
async def test_who_does_not_read_is_let_go(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = asyncio.Event()
    plain = connections.HttpConnection.connection_lost

    def seen(self: Any, error: Exception | None) -> None:
        lost.set()
        plain(self, error)

    monkeypatch.setattr(connections.HttpConnection, "connection_lost", seen)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)
        place = urlsplit(served.base_url)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(deaf, (place.hostname, place.port))
        asking = asyncio.create_task(
            loop.sock_sendall(deaf, b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
        )
        async with asyncio.timeout(30):
            await lost.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def test_there_is_an_end_to_connections(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    async with line(served.base_url), line(served.base_url), line(served.base_url) as third:
        answer = await third.answer()
        is_problem(answer, 503, "unavailable")
        assert int(answer.headers["retry-after"]) > 0

    async def served_again() -> bool:
        return (await ask(served.base_url, "GET", b"/livez")).status == 200

    await wait_until(served_again)


async def test_one_address_has_so_many_connections(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS_EACH", 2)
    gates = list[Gate]()
    plain = Gate.connected

    def elsewhere(self: Gate, peer: tuple[str, int] | None) -> str:
        gates.append(self)
        return plain(self, ("203.0.113.7", 1))

    monkeypatch.setattr(Gate, "connected", elsewhere)
    async with line(served.base_url), line(served.base_url), line(served.base_url) as third:
        is_problem(await third.answer(), 503, "unavailable")
    await wait_until(lambda: not gates[0].connections)
    monkeypatch.setattr(Gate, "connected", plain)
    async with line(served.base_url), line(served.base_url), line(served.base_url):
        assert (await ask(served.base_url, "GET", b"/livez")).status == 200
        assert not gates[0].connections, "this machine speaks for many"


# -------------------------------------------------------------------- sockets


async def test_a_socket_that_only_pings_is_let_go(served: Served) -> None:
    async with connect(served.socket_url, compression=None, ping_interval=None) as client:
        ping = Frame(Opcode.PING, b"x" * 100).serialize(mask=True, extensions=[])
        client.transport.write(ping * 500)
        async with asyncio.timeout(30):
            with suppress(ConnectionClosed):
                while True:
                    await client.recv()


async def test_a_socket_that_answers_no_pings_is_let_go(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.api.serving.PING_SECONDS", 0.3)
    served = await serve()
    async with connect(served.socket_url, compression=None, ping_interval=None) as client:
        for _ in range(2):  # welcome and mark: it is served
            await client.recv()
        client.transport.pause_reading()
        await wait_until(lambda: not served.parts.live.listeners)
        client.transport.abort()  # it would wait for a goodbye that it does not read


async def test_a_socket_outlasts_the_time_that_a_request_has(
    served: Served, hasty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.api.sockets.MARK_SECONDS", 0.1)
    async with connect(served.socket_url, compression=None) as client, asyncio.timeout(30):
        for _ in range(12):  # the welcome, and marks for a second
            await client.recv()


async def test_a_port_that_somebody_else_has_is_one_refusal(served: Served) -> None:
    """And not an exit in the middle of everything, with a status of uvicorn's own."""
    ended = asyncio.Event()

    class Reading:
        async def run(self) -> None:
            await ended.wait()

        def close(self) -> None:
            ended.set()

    with socket.create_server(("127.0.0.1", 0)) as squatter:
        port = squatter.getsockname()[1]
        app = create_app(served.parts)
        with pytest.raises(ServerFailed, match=f"FORGE_PORT={port} on FORGE_HOST=127.0.0.1 .*already in use"):
            await serve(app, Reading(), "127.0.0.1", port, asyncio.Event())  # type: ignore[arg-type] - what of it is used
    assert ended.is_set()
