"""Connections as uvicorn reads them, with a bound on everything a client can draw out.

uvicorn has no limit on a head, none on how long a request takes to arrive, and none on how long an answer or
a socket's messages wait for a client that does not read. All of these are bounded here, on the connection
itself: what never becomes a request cannot be bounded by a route.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import cast

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from forge.api import problems
from forge.api.gate import MAX_HEAD, Gate
from forge.domain.rates import Rate, take
from forge.errors import ForgeError, HeadTooLarge, Malformed, TooLarge, TooSlow, Unavailable

REQUEST_SECONDS = 15.0
"""For a whole request to arrive, and a second more for each 64 KiB of it."""

SLOWEST_BYTES = 64 * 1024
MAX_REQUEST = 32 * 1024 * 1024
"""No request is this large; the routes say less."""

STALLED_SECONDS = 20.0
"""For a client to take in what it was sent."""

MAX_CONNECTIONS = 8192
MAX_CONNECTIONS_EACH = 512
"""From one address; sockets have seats of their own, and proxies and this machine speak for many."""

PINGS = Rate(per_second=1.0, burst=20)


class HttpConnection(HttpToolsProtocol):
    """One connection; it must bring its requests in time, and take its answers."""

    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # there is none before the first request
    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _began = 0.0
    _received = 0
    _arriving = False
    _has_head = False
    _counted = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        gate = cast("Gate", self.config.app)
        self._counted = gate.connected(self.client)
        alone = not self._counted or gate.connections[self._counted] <= MAX_CONNECTIONS_EACH
        if len(self.connections) > MAX_CONNECTIONS or not alone:
            self._refuse(Unavailable("there are too many connections"))
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        self._leave()
        self.resume_writing()
        super().connection_lost(exc)

    def _leave(self) -> None:
        if self._counted:
            cast("Gate", self.config.app).disconnected(self._counted)
            self._counted = ""

    # ------------------------------------------------------------- arriving

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self:
            self._in_time()  # it is over, or a WebSocket by now: nothing more is expected here
        elif self._arriving or self._idle:
            self._bound()
        else:
            self._in_time()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._arriving, self._has_head = True, False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # what trails a body was no part of what was decided by
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_head = True
        super().on_headers_complete()
        if self.cycle is not None and cast("Gate", self.config.app).leaving:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._arriving, self._received = False, 0  # the next one counts for itself, however this was answered
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._in_time()
        self._leave()
        super().handle_websocket_upgrade()

    @property
    def _idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _bound(self) -> None:
        if self._late is None:
            self._expect()
        if not self._has_head and self._received > MAX_HEAD + SLOWEST_BYTES:
            self._refuse(HeadTooLarge())
        elif self._received > MAX_REQUEST:
            self._refuse(TooLarge())

    def _expect(self) -> None:
        self._began, self._received = self.loop.time(), 0
        self._late = self.loop.call_later(REQUEST_SECONDS, self._check)

    def _in_time(self) -> None:
        self._received = 0
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _check(self) -> None:
        """The request should be here by now, unless it is a large one, or it is us who do not take it in."""
        now = self.loop.time()
        if self.flow.read_paused:
            self._began = now
        left = self._began + REQUEST_SECONDS + self._received / SLOWEST_BYTES - now
        if left > 0:
            self._late = self.loop.call_later(left, self._check)
        elif self._arriving:
            self._refuse(TooSlow())
        else:
            self.transport.close()

    # ------------------------------------------------------------- refusing

    def send_400_response(self, msg: str) -> None:
        self._refuse(Malformed("this is not an HTTP request"))

    def _refuse(self, error: ForgeError) -> None:
        """Say why, where that would not fall into another answer, and hang up."""
        if self.transport.is_closing():
            return
        if self._may_answer():
            self.transport.write(_raw(error))
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _may_answer(self) -> bool:
        if self.cycle is None:
            return True
        if self._arriving and self._has_head:
            return not (self.pipeline or self.cycle.response_started)
        return self.cycle.response_complete

    # ------------------------------------------------------------- answering

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class SocketConnection(WebSocketsSansIOProtocol):
    """One WebSocket; it must read what it is sent, and not live on pings."""

    _stalled: asyncio.TimerHandle | None = None
    _pinged = 0.0

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def handle_ping(self) -> None:
        # Each is answered without waiting for the client to read the answer.
        wait, self._pinged = take(PINGS, self._pinged, self.loop.time())
        if wait:
            self.transport.abort()
        else:
            super().handle_ping()


def _raw(error: ForgeError) -> bytes:
    problem, headers = problems.problem_of(error)
    body = msgspec.json.encode(problem)
    told = {
        "content-type": problems.MEDIA_TYPE,
        "content-length": str(len(body)),
        "cache-control": "no-store",
        "connection": "close",
    } | headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n{lines}\r\n".encode() + body
