"""Requests written byte by byte, for what no proper client would send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httptools
import msgspec

SECONDS = 60.0


class Answer(msgspec.Struct):
    """What came back; status 0 when the server only hung up."""

    status: int = 0
    headers: dict[str, str] = {}
    body: bytes = b""

    @property
    def type(self) -> str:
        return self.headers.get("content-type", "")


class Line:
    """A connection on which anything can be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> Answer:
        """Everything until the server hangs up, which it must within ``SECONDS``, as one answer."""
        found, parsing = Answer(), _Parsing()
        parsing.found = found
        parser = httptools.HttpResponseParser(parsing)
        async with asyncio.timeout(SECONDS):
            while True:
                try:
                    data = await self.reader.read(65536)
                except ConnectionResetError:
                    return found
                if not data:
                    return found
                parser.feed_data(data)
                found.status = parser.get_status_code()


class _Parsing:
    found: Answer

    def on_header(self, name: bytes, value: bytes) -> None:
        self.found.headers[name.decode().lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self.found.body += body


@asynccontextmanager
async def line(base_url: str) -> AsyncIterator[Line]:
    place = urlsplit(base_url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        yield Line(reader, writer)
    finally:
        writer.transport.abort()


async def ask(
    base_url: str,
    method: str,
    target: bytes,
    headers: Sequence[tuple[bytes, bytes]] = (),
    body: bytes = b"",
) -> Answer:
    """One request on a connection of its own."""
    pairs = [
        (b"Host", b"127.0.0.1"),
        (b"Connection", b"close"),
        (b"Content-Length", str(len(body)).encode()),
        *headers,
    ]
    head = b"".join(name + b": " + value + b"\r\n" for name, value in pairs)
    async with line(base_url) as connection:
        await connection.say(method.encode() + b" " + target + b" HTTP/1.1\r\n" + head + b"\r\n" + body)
        return await connection.answer()
