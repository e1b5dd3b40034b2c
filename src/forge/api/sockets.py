"""``GET /events``: the socket protocol ``forge.v1``. Every message is a JSON object with its kind in ``t``.

::

    server: welcome {v, conn, epoch, head, mark_ms, max_lag}   ev {seq, type, key, at, data, traceparent?}
            mark {seq}   live {key, kind, data}   reset {reason, head}   bye {code, retry_after_ms}
    client: sub {epoch, after, topics}

``ev`` is durable and in order; resume with the highest ``seq`` seen in ``ev`` or ``mark``. ``live`` is only
the latest. ``reset`` means that the events since ``after`` are not at hand: read the lists again. A client
that offers the sub-protocol ``forge.v1`` begins with ``sub``; any other gets events at once, from ``?after=``
on or from now.

A socket keeps no queue: it has a position among the events all sockets share, so a slow reader costs nothing
and is let go when it falls out of what is remembered.

Who may open one: a key in the header, or, for web pages, a ticket of ``POST /events/ticket``, sent as the
sub-protocol ``ticket.T`` beside ``forge.v1``. Whether the key is still good is asked again while it is open.

Close codes: 4401 no key or ticket, or no longer · 4403 not for this user or page · 4408 too slow · 4429 too
many sockets or messages · 1008 nonsense · 1009 too large · 1012 going · 1013 try later.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import datetime
from typing import Annotated, Any, Literal, get_args
from uuid import uuid4

import msgspec
from litestar import Request, Response, WebSocket, post, websocket
from litestar.exceptions import WebSocketDisconnect
from opentelemetry.trace import Span

from forge.api import origins
from forge.api.auth import Caller, admitted, caller_of, door_of
from forge.api.edge import MAX_SEQ
from forge.api.live import REMEMBERED, Live
from forge.api.parts import parts_of
from forge.api.problems import documented
from forge.api.seats import AllTaken, Seats
from forge.domain.rates import Rate, take
from forge.errors import Forbidden, ForgeError, LimitReached, Unauthenticated, Unavailable
from forge.telemetry import PRODUCER, SERVER, afterwards, span
from forge.telemetry.numbers import counter

PROTOCOL = "forge.v1"
MARK_SECONDS = 10.0
SEND_SECONDS = 10.0
RIGHTS_SECONDS = 2.0
MAX_MESSAGE = 16 * 1024
MESSAGES = Rate(per_second=2.0, burst=20)

UNAUTHENTICATED, FORBIDDEN, TOO_SLOW, TOO_MANY = 4401, 4403, 4408, 4429
GOING, TRY_LATER, MALFORMED, TOO_BIG = 1012, 1013, 1008, 1009

_TICKET = "ticket."

_ended = counter("forge_sockets_ended", "Event sockets that forge ended.", "code")

Topic = Literal["jobs", "assets", "progress"]
_ALL_TOPICS = frozenset[str](get_args(Topic))

Socket = WebSocket[Any, Any, Any]


class Sub(msgspec.Struct, frozen=True, tag_field="t", tag="sub"):
    """Send what happened after a sequence (default: from now on) on these topics (default: all)."""

    epoch: str | None = None
    after: Annotated[int, msgspec.Meta(ge=0, le=MAX_SEQ)] | None = None
    topics: list[Topic] | None = None


_sub = msgspec.json.Decoder(Sub)


class _Leave(Exception):
    """The socket is to be closed with a code."""

    def __init__(self, code: int, retry_after_ms: int = 0) -> None:
        self.code, self.retry_after_ms = code, retry_after_ms


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """Good for one socket, once, until ``expires_at``."""

    ticket: str
    expires_at: datetime


@post("/events/ticket", status_code=201, tags=["live"], responses=documented(), operation_id="giveTicket")
async def give_ticket(request: Request[Any, Any, Any]) -> Response[Ticket]:
    """A ticket for one socket. Offer it within 30 s as the sub-protocol `ticket.T` beside `forge.v1`."""
    ticket, until = await request.app.state.tickets.give(caller_of(request))
    return Response(Ticket(ticket=ticket, expires_at=until), headers={"cache-control": "no-store"})


@websocket("/events")
async def events(socket: Socket) -> None:
    """Live job and asset events, resumable by sequence."""
    live = parts_of(socket).live
    offered = PROTOCOL in socket.scope.get("subprotocols", [])
    await socket.accept(subprotocols=PROTOCOL if offered else None)
    try:
        with ExitStack() as seat:
            with _opening(socket):
                caller = await _admitted(socket, live)
                seat.enter_context(_seats(socket).taken(caller.user))
                conversation = Conversation(socket, caller, live)
                await conversation.welcome(None if offered else _after(socket, live))
            await conversation.hold()
    except _Leave as leave:
        await _say_goodbye(socket, leave)
    except AllTaken as full:
        await _say_goodbye(socket, _Leave(TOO_MANY, 30_000) if full.own else _Leave(TRY_LATER, 5000))
    except WebSocketDisconnect:
        pass


def _opening(socket: Socket) -> AbstractContextManager[Span]:
    """A span until the welcome; what is told later is part of the traces of what it is about."""
    path = socket.scope["path"]
    fields = {"http.request.method": "GET", "http.route": path, "url.path": path}
    return span(f"GET {path}", socket.headers.get("traceparent", ""), fields, kind=SERVER)


def _seats(socket: Socket) -> Seats:
    seats: Seats = socket.scope["litestar_app"].state.seats
    return seats


async def _admitted(socket: Socket, live: Live) -> Caller:
    if live.closing:
        raise _Leave(GOING, 1000)
    if not live.admissions.caught_up.is_set():
        raise _Leave(TRY_LATER, 500)
    listed = parts_of(socket).settings.allowed_origins
    if not origins.allowed(socket.headers.get("origin"), socket.headers.get("host", ""), listed):
        raise _Leave(FORBIDDEN)
    try:
        return await _known(socket)
    except Unauthenticated:
        raise _Leave(UNAUTHENTICATED) from None
    except Forbidden:
        raise _Leave(FORBIDDEN) from None
    except LimitReached:
        raise _Leave(TOO_MANY, 5000) from None
    except Unavailable:
        raise _Leave(TRY_LATER, 1000) from None
    except ForgeError:
        raise _Leave(MALFORMED) from None


async def _known(socket: Socket) -> Caller:
    for offered in socket.scope.get("subprotocols", []):
        if offered.startswith(_TICKET):
            caller: Caller = await socket.scope["litestar_app"].state.tickets.take(offered[len(_TICKET) :])
            if not door_of(socket).lets_stay(caller):
                raise Unauthenticated  # the key was revoked since it got the ticket
            return caller
    return admitted(socket)


def _after(socket: Socket, live: Live) -> int:
    given = socket.query_params.get("after")
    if given is None:
        return live.newest
    if not given.isdecimal() or len(given) > 18:
        raise _Leave(MALFORMED)
    return int(given)


async def _say_goodbye(socket: Socket, leave: _Leave) -> None:
    _ended.labels(leave.code).inc()
    bye = {"t": "bye", "code": leave.code, "retry_after_ms": leave.retry_after_ms}
    try:
        async with asyncio.timeout(1.0):
            await socket.send_text(msgspec.json.encode(bye).decode())
            await socket.close(code=leave.code)
    except (TimeoutError, WebSocketDisconnect, RuntimeError, OSError):
        pass  # it is gone, or does not listen: the server drops the connection


class Conversation:
    """One socket: where it stands in the log, and what it wants to hear."""

    def __init__(self, socket: Socket, caller: Caller, live: Live) -> None:
        self.socket, self.caller, self.live = socket, caller, live
        self.news = asyncio.Event()
        self.position: int | None = None
        self.mark_due = asyncio.get_running_loop().time() + MARK_SECONDS
        self.tick = live.ticks
        self.topics: frozenset[str] = _ALL_TOPICS
        self.spoken = 0.0

    async def welcome(self, after: int | None) -> None:
        """Introduce the log; begin at once where ``after`` is given."""
        live = self.live
        await self._send(
            t="welcome",
            v=1,
            conn=uuid4().hex,
            epoch=live.epoch,
            head=live.newest,
            mark_ms=int(MARK_SECONDS * 1000),
            max_lag=REMEMBERED,
        )
        if after is not None:
            await self._begin(after, live.epoch)

    async def hold(self) -> None:
        """Tell and listen until one of the two ends."""
        self.live.listeners.add(self.news)
        tasks = [asyncio.create_task(work) for work in (self._tell(), self._listen(), self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self.live.listeners.discard(self.news)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --------------------------------------------------------------- watching

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RIGHTS_SECONDS)
            self._still_admitted()

    def _still_admitted(self) -> None:
        """Asked before every event, too, because sending may take time: a revoked key is told nothing."""
        if not door_of(self.socket).lets_stay(self.caller):
            raise _Leave(UNAUTHENTICATED)

    # -------------------------------------------------------------- listening

    async def _listen(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            text = await self.socket.receive_data(mode="text")
            wait, self.spoken = take(MESSAGES, self.spoken, now())
            if wait:
                raise _Leave(TOO_MANY, 5000)
            if len(text) > MAX_MESSAGE:
                raise _Leave(TOO_BIG)
            self._still_admitted()
            await self._heed(text)

    async def _heed(self, text: str) -> None:
        try:
            sub = _sub.decode(text)
        except (msgspec.DecodeError, RecursionError, ValueError):
            raise _Leave(MALFORMED) from None
        self.topics = _ALL_TOPICS if sub.topics is None else frozenset(sub.topics)
        after = self.live.newest if sub.after is None else sub.after
        await self._begin(after, sub.epoch or self.live.epoch)

    async def _begin(self, after: int, epoch: str) -> None:
        live = self.live
        if epoch != live.epoch or after > live.newest:
            after = await self._reset("epoch")
        elif after < live.floor:
            after = await self._reset("behind")
        self.position, self.mark_due = after, 0.0
        self.news.set()

    async def _reset(self, reason: str) -> int:
        head = self.live.head
        await self._send(t="reset", reason=reason, head=head)
        return head

    # ---------------------------------------------------------------- telling

    async def _tell(self) -> None:
        now = asyncio.get_running_loop().time
        while True:
            self.news.clear()
            if self.live.closing:
                raise _Leave(GOING, 1000)
            self._still_admitted()
            if self.position is not None:
                await self._tell_events(self.position)
                await self._tell_progress()
            if now() >= self.mark_due:
                await self._mark()
                self.mark_due = now() + MARK_SECONDS
            with suppress(TimeoutError):
                async with asyncio.timeout_at(max(self.mark_due, now())):
                    await self.news.wait()

    async def _mark(self) -> None:
        if self.position is None:
            raise _Leave(MALFORMED)  # it was to begin with `sub`
        await self._send(t="mark", seq=self.position)

    async def _tell_events(self, start: int) -> None:
        if start < self.live.floor:
            raise _Leave(TOO_SLOW)
        head = self.live.head
        for told in self.live.since(start):
            if self.position != start:
                return  # the client has asked for another place meanwhile
            self._still_admitted()
            if told.topic in self.topics and self.caller.may_see(told.user):
                began = time.time()
                await self._send_text(told.text())
                afterwards("forge.tell", told.record, began, kind=PRODUCER)
        if self.position == start:
            self.position = max(head, start)

    async def _tell_progress(self) -> None:
        newest = self.live.ticks
        if "progress" in self.topics:
            for latest in [*self.live.progress(self.tick)]:
                if self.caller.may_see(latest.user):
                    await self._send_text(latest.text)
        self.tick = newest

    async def _send(self, **message: Any) -> None:
        await self._send_text(msgspec.json.encode(message).decode())

    async def _send_text(self, text: str) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self.socket.send_text(text)
        except TimeoutError:
            raise _Leave(TOO_SLOW) from None
        except (RuntimeError, OSError) as error:  # what servers raise when the client has gone
            raise WebSocketDisconnect(detail=str(error)) from error
