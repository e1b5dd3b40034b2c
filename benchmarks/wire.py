"""An HTTP/1.1 client that costs next to nothing: one keep-alive connection, one request at a time.

httpx takes 0.8 ms of CPU a request and aiohttp 0.2 ms; on a machine that also runs the server, that would be
measured too.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any
from urllib.parse import urlsplit

import httptools

from benchmarks.harness import PATIENCE_SECONDS


class Connection(asyncio.Protocol):
    """Use :func:`connect`, then :meth:`ask` again and again."""

    def __init__(self) -> None:
        self._parser: Any = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._body: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server hung up"))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._body)))
        self._body = []
        self._parser = httptools.HttpResponseParser(self)

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send one whole request; its status and body."""
        if self._transport.is_closing():
            raise ConnectionError("the server hung up before this request")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    async def insist(self, request: bytes) -> tuple[int, bytes]:
        """Ask again while the server answers 503, as it does where it is too busy to know in time."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            status, body = await self.ask(request)
            if status != 503 or time.monotonic() > deadline:
                return status, body
            await asyncio.sleep(0.2)

    def close(self) -> None:
        self._transport.close()


async def connect(url: str) -> Connection:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(Connection, parts.hostname or "", parts.port or 80)
    return connection


def post(url: str, path: str, body: bytes, user: str, key: str = "") -> bytes:
    """A whole POST of JSON in a user's name; with an Idempotency-Key it may be sent again."""
    keyed = f"Idempotency-Key: {key}\r\n" if key else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
        f"X-Forge-User: {user}\r\n{keyed}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
