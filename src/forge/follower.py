"""Following a stream from a position, in order, for ever: what every projection and live fold reads through.

A short-lived consumer without acks answers pull requests into a callback, the fastest reading nats-py knows.
The reader's own position is what counts: when the server, the connection or the consumer goes, reading
resumes behind the last event that was handed over, if the log still has it.

Facts this rests on (measured on nats-server 2.15): of a damaged block a consumer delivers nothing, or skips a
message, without a word; asked for such a message directly, the server says that there is none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any
from uuid import uuid4

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from forge.broker import BrokerRefused, ends, request, stored, stored_at
from forge.domain.chain import ARRIVED, Entry, written
from forge.domain.wholeness import gap
from forge.errors import LogDamaged, LogUnavailable, LogUnreadable
from forge.events.envelope import Recorded, open_envelope
from forge.topology import ALL_EVENTS, EVENTS

log = logging.getLogger("forge.follower")

_CREDIT = 1000
_HEARTBEAT_SECONDS = 1.0
_SILENT_SECONDS = 4.0
_STALLED_SECONDS = 4.0
_EXPIRES_SECONDS = 30.0


class Batch(msgspec.Struct, frozen=True):
    """Events in order, as many as had arrived; ``caught_up`` when nothing newer was in the log by then."""

    records: list[Recorded]
    caught_up: bool


class Written(msgspec.Struct, frozen=True):
    """The same as they were written, whether they can be read or not."""

    entries: list[Entry]
    caught_up: bool


async def follow(
    nc: Client,
    start: int,
    filters: Sequence[str] = (ALL_EVENTS,),
    *,
    stream: str = EVENTS,
    most: int = 1000,
) -> AsyncGenerator[Batch, None]:
    """Yield the events from sequence ``start`` on, in order, for ever, at most ``most`` at a time.

    The first batch comes at once, empty if there is nothing to read. Heals itself over lost connections and
    restarted servers.

    Raises:
        LogUnreadable: an event cannot be decoded; everything before it was handed over, nothing behind it.
        LogDamaged: what was read last is not in the log any more, or what is due can not be read. Who reads
            the whole log is told of every gap, and has everything before it.
    """
    async with aclosing(_messages(nc, start, filters, stream, most)) as batches:
        async for messages, caught_up in batches:
            records: list[Recorded] = []
            while len(records) < len(messages):
                try:
                    records.extend(map(_opened, messages[len(records) :]))
                except LogUnreadable as error:
                    try:
                        records.append(await _once_more(nc, stream, messages[len(records)], error))
                    except LogUnreadable:
                        yield Batch(records, False)  # whoever stops at it has everything before it
                        raise
            yield Batch(records, caught_up)


async def follow_written(nc: Client, start: int) -> AsyncGenerator[Written, None]:
    """The whole log from a sequence on, as :func:`follow` does, without reading what the messages say.

    Raises:
        LogDamaged: as there.
    """
    async with aclosing(_messages(nc, start, (ALL_EVENTS,), EVENTS, 1000)) as batches:
        async for messages, caught_up in batches:
            yield Written([_entry(message) for message in messages], caught_up)


class _Message(msgspec.Struct, frozen=True):
    """A delivery, and where it stands in the stream; ``nanoseconds`` is when it arrived there."""

    seq: int
    nanoseconds: int
    of: Msg


def _opened(message: _Message) -> Recorded:
    return open_envelope(message.seq, message.of.subject, message.of.headers, message.of.data)


async def _once_more(nc: Client, stream: str, message: _Message, error: LogUnreadable) -> Recorded:
    """What cannot be read may have been spoilt on its way.

    Raises:
        LogUnreadable: it was not.
    """
    try:
        found = await stored_at(nc, stream, message.seq)
    except LogUnavailable:
        raise error from None
    if found is None:
        raise error
    return open_envelope(message.seq, message.of.subject, found.headers, found.data)


def _entry(message: _Message) -> Entry:
    given = message.of.headers or {}
    arrived = datetime.fromtimestamp(message.nanoseconds // 1_000_000_000, UTC)
    arrived += timedelta(microseconds=message.nanoseconds % 1_000_000_000 // 1000)
    if ARRIVED in given:
        arrived = datetime.fromisoformat(given[ARRIVED])
    return Entry(message.seq, message.of.subject, written(given), message.of.data, arrived)


async def _messages(
    nc: Client, start: int, filters: Sequence[str], stream: str, most: int
) -> AsyncGenerator[tuple[list[_Message], bool], None]:
    position, pause = start - 1, 0.1
    last: _Message | None = None
    whole = stream == EVENTS and tuple(filters) == (ALL_EVENTS,)
    while True:
        try:
            if last is not None:
                await _still_there(nc, stream, last)
            async with _Reader(nc, stream, position + 1, filters) as reader:
                pause = 0.1
                async for messages, caught_up in reader.batches(most):
                    wrong = gap(position, messages) if whole else None
                    if wrong is not None:
                        yield [m for nth, m in enumerate(messages) if m.seq == position + 1 + nth], False
                        raise LogDamaged(wrong)
                    yield messages, caught_up
                    last = messages[-1] if messages else last
                    position = messages[-1].seq if messages else position
        except (LogUnavailable, BrokerRefused) as error:
            log.warning("following %s is interrupted: %s", stream, error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 2.0)


async def _still_there(nc: Client, stream: str, last: _Message) -> None:
    """A server that was away may come back with another log, or with less of it.

    Raises:
        LogDamaged: it did.
        LogUnavailable: no answer.
    """
    first, head = await ends(nc, stream)
    if head < last.seq:
        raise LogDamaged(f"it ends at event {head}, and event {last.seq} was read from it before")
    found = await stored_at(nc, stream, last.seq)
    if found is None and first <= last.seq:
        raise LogDamaged(f"event {last.seq} can not be read any more")
    if found is not None and _id(found) != _id(last.of):
        raise LogDamaged(f"it is another log: its event {last.seq} is not the one that was read before")


def _id(message: Msg) -> str:
    return (message.headers or {}).get("ce-id", "")


class _Reader:
    """One server-side consumer and the messages it has sent."""

    def __init__(self, nc: Client, stream: str, start: int, filters: Sequence[str]) -> None:
        self.nc, self.stream, self.start, self.filters = nc, stream, start, filters
        self.name = f"follow-{uuid4().hex[:12]}"
        self.position = start - 1
        self.arrived: deque[Msg] = deque()
        self.news = asyncio.Event()
        self.credit = 0
        self.delivered = self.received = 0
        self.pending = 0
        self.heard = self.moved = time.monotonic()
        self.broken = ""
        self.sub: Subscription | None = None

    async def __aenter__(self) -> _Reader:
        config: dict[str, Any] = {
            "name": self.name,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(60e9),
            "replay_policy": "instant",
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": max(1, self.start),
            "filter_subjects": list(self.filters),
        }
        created = await request(
            self.nc,
            f"CONSUMER.CREATE.{self.stream}.{self.name}",
            {"stream_name": self.stream, "config": config, "action": "create"},
        )
        self.pending = int(msgspec.json.decode(created).get("num_pending", 0))
        self.inbox = self.nc.new_inbox()
        self.sub = await self.nc.subscribe(
            self.inbox, cb=self._on_message, pending_msgs_limit=-1, pending_bytes_limit=-1
        )
        await self._ask()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.sub is None or self.nc.is_closed:
            return
        # also while the server is away, or it would be renewed when that is back
        await self.sub.unsubscribe()
        if self.nc.is_connected:
            await self.nc.publish(f"$JS.API.CONSUMER.DELETE.{self.stream}.{self.name}")

    async def batches(self, most: int) -> AsyncIterator[tuple[list[_Message], bool]]:
        if not self.pending:
            yield [], True
        while True:
            if not self.arrived:
                await self._wait()
            taken = [self.arrived.popleft() for _ in range(min(most, len(self.arrived)))]
            if not taken:
                continue
            self.credit -= len(taken)
            if self.credit <= _CREDIT // 2:
                await self._ask()
            messages = [self._took(message) for message in taken]
            yield messages, not self.arrived and self.pending == 0

    def _took(self, message: Msg) -> _Message:
        """Take note of one delivery; its reply subject ends in stream sequence, consumer sequence, time,
        pending."""
        try:
            seq, delivered, arrived, pending = map(int, message.reply.split(".")[-4:])
        except ValueError:
            raise LogUnavailable(f"a delivery arrived garbled: {message.reply!r}") from None
        self.delivered += 1
        if delivered != self.delivered:
            raise LogUnavailable(f"delivery {delivered} came where {self.delivered} was due")
        self.pending, self.position = pending, seq
        return _Message(seq, arrived, message)

    async def _wait(self) -> None:
        """Wait for a message; raises when the server has been silent for too long."""
        self.news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEARTBEAT_SECONDS):
                await self.news.wait()
        if self.broken:
            raise LogUnavailable(self.broken)
        if time.monotonic() - self.heard > _SILENT_SECONDS:
            raise LogUnavailable(f"no sign of life from {self.stream} for {_SILENT_SECONDS} s")
        if self.pending and not self.arrived and time.monotonic() - self.moved > _STALLED_SECONDS:
            await self._look()

    async def _look(self) -> None:
        """See whether what is due, and does not come, is there at all: then its delivery got lost with a
        connection, and the server, which heard no more of that, would not make it again."""
        for filter_ in self.filters:
            query: dict[str, object] = {"seq": self.position + 1, "next_by_subj": filter_}
            if await stored(self.nc, self.stream, query) is not None:
                raise LogUnavailable(f"what comes behind event {self.position} is there, and does not arrive")
        if self.pending and not self.arrived:
            raise LogDamaged(f"the event after {self.position} can not be read")

    async def _ask(self) -> None:
        count = _CREDIT - self.credit
        self.credit += count
        await self.nc.publish(
            f"$JS.API.CONSUMER.MSG.NEXT.{self.stream}.{self.name}",
            msgspec.json.encode(
                {
                    "batch": count,
                    "expires": int(_EXPIRES_SECONDS * 1e9),
                    "idle_heartbeat": int(_HEARTBEAT_SECONDS * 1e9),
                }
            ),
            reply=self.inbox,
        )

    async def _on_message(self, message: Msg) -> None:
        self.heard = time.monotonic()
        status = message.headers.get("Status") if message.headers else None
        if status is None:
            self.moved = self.heard
            self.received += 1
            self.arrived.append(message)
        elif status == "408":  # a request has expired: what it had left is void
            self.credit -= int((message.headers or {}).get("Nats-Pending-Messages", 0))
            if self.credit <= _CREDIT // 2:
                await self._ask()
        elif status == "100":
            sent = int((message.headers or {}).get("Nats-Last-Consumer", 0))
            if sent > self.received:  # with a connection; the server would not send them again
                self.broken = f"{sent - self.received} deliveries got lost"
        else:
            self.broken = (
                f"the server ended the request: {status} {(message.headers or {}).get('Description', '')}"
            )
        self.news.set()
