"""The log: load a boundary, append with an expectation, read one position.

Every append names what its decision saw: "nothing newer than sequence N matches this filter". Several events
are one atomic batch, each with its own boundary: all are written or none. A lost answer followed by a retry
looks like a conflict to the server, so a conflict is first checked for being one's own event.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Protocol, TypeVar
from uuid import UUID, uuid4

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from forge.broker import (
    BrokerRefused,
    ends,
    exchange,
    heed_cancellation,
    request,
    stored,
    stored_at,
    understood,
)
from forge.domain.chain import ARRIVED
from forge.errors import Conflict, LogUnavailable, LogUnreadable
from forge.events.catalogue import Event, encode
from forge.events.envelope import Meta, Recorded, event_id, headers, open_envelope
from forge.telemetry import PRODUCER, correlation, part, traceparent
from forge.topology import EVENTS, matches, subject

T = TypeVar("T")

_WRONG_LAST = (10071, 10164)  # 10164: the same on a replicated stream, another write is in flight
_DUPLICATE = 10201  # an event of a batch is in the log already
_TRY_AGAIN = (10176, 10210)  # a server that restarted has forgotten the first half of a batch; too many open
_EXPECTED = "Nats-Expected-Last-Subject-Sequence"
_EXPECTED_FILTER = "Nats-Expected-Last-Subject-Sequence-Subject"

_TIME = re.compile(r"(\.\d{1,6})\d*(Z)")  # Python reads microseconds

MAX_BATCH = 1000


class Draft(msgspec.Struct, frozen=True):
    """An event to append. ``boundary`` and ``expected`` say: nothing newer than this matches that filter."""

    event: Event
    meta: Meta
    boundary: str | None = None
    expected: int = 0


class Entry(msgspec.Struct, frozen=True):
    """An event that is to be written with others, and the boundary whose newest event it expects, if any."""

    event: Event
    boundary: str | None = None
    expected: int = 0


class Boundary(msgspec.Struct, frozen=True):
    """What the log holds of one consistency boundary: its events in order and the last sequence (0: none)."""

    filter: str
    events: list[Recorded]
    seq: int


class LogState(msgspec.Struct, frozen=True):
    """The newest event's sequence (0 in an empty log) and time of arrival, and the server's own time."""

    head: int
    last_at: datetime | None
    now: datetime


class _State(msgspec.Struct):
    last_seq: int
    last_ts: datetime


class _Info(msgspec.Struct):
    state: _State
    ts: datetime


_info = msgspec.json.Decoder(_Info)


class _Ack(msgspec.Struct):
    seq: int = 0
    count: int = 1
    duplicate: bool = False
    error: _Failure | None = None


class _Failure(msgspec.Struct):
    err_code: int = 0
    description: str = ""


_ack = msgspec.json.Decoder(_Ack)


class Before(Protocol):
    """The closed part of the log, see :class:`forge.closed.Closed`; ``through`` is its last event."""

    @property
    def through(self) -> int: ...
    async def newest(self, filter_: str, timeout: float) -> list[Recorded]: ...
    async def last(self, filter_: str, timeout: float) -> Recorded | None: ...
    async def at(self, seq: int, timeout: float) -> Recorded | None: ...
    async def since(self, moment: datetime) -> Recorded | None: ...
    def pages(self, start: int, filters: Sequence[str]) -> AsyncIterator[list[Recorded]]: ...


class EventStore:
    """Appends to and reads from the log over one NATS connection; what the stream has let go is read from
    ``before``, which needs Postgres."""

    def __init__(self, nc: Client, stream: str = EVENTS, before: Before | None = None) -> None:
        self.nc, self.stream, self.before = nc, stream, before

    # -------------------------------------------------------------- appending

    @part("forge.append", kind=PRODUCER)
    async def append(self, drafts: Sequence[Draft], *, within: float = 10.0) -> list[Recorded]:
        """Append all events or none, in order.

        A time-out or an absent server is tried again for ``within`` seconds; it is safe, since ids decide.

        Raises:
            Conflict: a boundary has moved on; load it and decide again.
            LogUnavailable: no answer; whether the events were written is unknown, repeat the command.
            BrokerRefused: the server's own refusal, for example a stream that is full.
            ValueError: the drafts were made wrongly: none, too many, no boundary, or one that does not
                cover its event.
        """
        subjects = [subject(draft.event) for draft in drafts]
        _check(drafts, subjects)
        deadline, pause = time.monotonic() + within, 0.05
        while True:
            left = max(0.05, deadline - time.monotonic())
            try:
                first = await self._write(drafts, subjects, min(left, 2.0))
            except LogUnavailable:
                if time.monotonic() + pause >= deadline:
                    raise
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)
                continue
            except BrokerRefused as refused:
                if refused.err_code not in (*_WRONG_LAST, _DUPLICATE):
                    raise
                # a batch stands side by side, and its last event is the newest of its subject
                last = await self._mine(drafts[-1], subjects[-1])
                if last is None:
                    raise Conflict(refused.detail) from refused
                first = last - len(drafts) + 1
            return [
                Recorded(first + nth, where, draft.meta, draft.event)
                for nth, (where, draft) in enumerate(zip(subjects, drafts, strict=True))
            ]

    async def _write(self, drafts: Sequence[Draft], subjects: list[str], timeout: float) -> int:
        if len(drafts) == 1:
            return (await self._send(drafts[0], subjects[0], {}, timeout)).seq
        batch, last = uuid4().hex, len(drafts)
        await self._send(drafts[0], subjects[0], _position(batch, 1), timeout)
        for nth in range(2, last):
            draft, where = drafts[nth - 1], subjects[nth - 1]
            await self.nc.publish(
                where, encode(draft.event), headers=self._headers(draft, where, _position(batch, nth))
            )
        ack = await self._send(drafts[-1], subjects[-1], _position(batch, last, commit=True), timeout)
        return ack.seq - ack.count + 1

    async def _send(self, draft: Draft, where: str, extra: dict[str, str], timeout: float) -> _Ack:
        answer = await exchange(
            self.nc, where, encode(draft.event), self._headers(draft, where, extra), timeout
        )
        ack = understood(_ack, answer) if answer else _Ack()
        if ack.error is not None and ack.error.err_code in _TRY_AGAIN:
            raise LogUnavailable(f"nothing was written: {ack.error.description}")
        if ack.error is not None:
            raise BrokerRefused(ack.error.err_code, ack.error.description)
        if answer and not ack.seq:
            raise LogUnavailable("an answer of NATS says no sequence")
        return ack

    def _headers(self, draft: Draft, where: str, extra: dict[str, str]) -> dict[str, str]:
        made = headers(draft.event, draft.meta, where) | extra
        if draft.boundary is not None:
            # the server knows nothing of what it has let go
            closed = self.before is not None and draft.expected <= self.before.through
            made[_EXPECTED] = "0" if closed else str(draft.expected)
            if draft.boundary != where:
                made[_EXPECTED_FILTER] = draft.boundary
        return made

    async def _mine(self, draft: Draft, where: str) -> int | None:
        """Where this very event stands, if it was written before and only the answer got lost."""
        last = await self.last(where)
        same = last is not None and last.meta.id == draft.meta.id and last.event == draft.event
        return last.seq if same and last is not None else None

    # ---------------------------------------------------------------- reading

    async def load(self, filter_: str, *, timeout: float = 2.0) -> Boundary:
        """The last event of every subject a filter covers, in order: for a job, all its facts, of adoptions
        and redirections of one attempt only the newest, which counts them.

        At most 1 024 subjects, by the server's rule.

        Raises:
            LogUnavailable: no answer in time; of Postgres, if some may be closed.
            LogUnreadable: an event cannot be decoded.
        """
        events = await _unspoilt(lambda: self._load(filter_, timeout))
        if self.before is not None:
            newer = {record.subject for record in events}
            closed = await self.before.newest(filter_, timeout)
            events = [record for record in closed if record.subject not in newer] + events
        return Boundary(filter_, events, events[-1].seq if events else 0)

    async def _load(self, filter_: str, timeout: float) -> list[Recorded]:
        inbox = self.nc.new_inbox()
        sub = await self.nc.subscribe(inbox)
        events: list[Recorded] = []
        try:
            query = msgspec.json.encode({"multi_last": [filter_]})
            await self.nc.publish(f"$JS.API.DIRECT.GET.{self.stream}", query, reply=inbox)
            while True:
                message = await sub.next_msg(timeout=timeout)
                status = (message.headers or {}).get("Status")
                if status in ("204", "404"):
                    return events
                if status:
                    raise LogUnavailable(f"reading {filter_}: {(message.headers or {}).get('Description')}")
                events.append(_recorded(message))
        except TimeoutError as error:
            raise LogUnavailable(f"reading {filter_}: no answer in {timeout} s") from error
        finally:
            await sub.unsubscribe()
            heed_cancellation()

    async def at(self, seq: int, *, timeout: float = 2.0) -> Recorded | None:
        """The event at one position, None where there is none."""
        if self.before is not None and seq <= self.before.through:
            return await self.before.at(seq, timeout)
        return await self._get(partial(stored_at, self.nc, self.stream, seq, timeout))

    async def id_at(self, seq: int, *, timeout: float = 2.0) -> str | None:
        """The id of the event at one position, which need not be readable otherwise; None where there is none
        or it is damaged."""
        message = await stored_at(self.nc, self.stream, seq, timeout)
        return None if message is None else (message.headers or {}).get("ce-id", "")

    async def last(self, filter_: str, *, timeout: float = 2.0) -> Recorded | None:
        """The newest event a filter covers."""
        found = await self._get(partial(stored, self.nc, self.stream, {"last_by_subj": filter_}, timeout))
        if found is None and self.before is not None:
            return await self.before.last(filter_, timeout)
        return found

    async def since(self, moment: datetime, *, timeout: float = 2.0) -> Recorded | None:
        """The first event that arrived at this moment or later, by the server's clock.

        Looked for between the ends, since to the server all of a restored log arrived when it was restored.
        """
        closed = None if self.before is None else await self.before.since(moment)
        if closed is not None:
            return closed
        low, high = 1 if self.before is None else self.before.through + 1, await self.head() + 1
        while low < high:
            middle = (low + high) // 2
            message = await stored(self.nc, self.stream, {"seq": middle}, timeout)
            if message is None or _arrived(message) >= moment:
                high = middle
            else:
                low = middle + 1
        return await self.at(low, timeout=timeout)

    async def state(self) -> LogState:
        """Where the log ends, and what time its server has.

        Raises:
            LogUnavailable: no answer in time.
        """
        info = _info.decode(await request(self.nc, f"STREAM.INFO.{self.stream}"))
        return LogState(info.state.last_seq, info.state.last_ts if info.state.last_seq else None, info.ts)

    async def head(self) -> int:
        """The sequence of the newest event, 0 in an empty log."""
        return (await ends(self.nc, self.stream))[1]

    async def _get(self, look: Callable[[], Awaitable[Msg | None]]) -> Recorded | None:
        async def get() -> Recorded | None:
            message = await look()
            return None if message is None else _recorded(message)

        return await _unspoilt(get)


async def _unspoilt(read: Callable[[], Awaitable[T]]) -> T:
    """What cannot be read may have been spoilt on its way, and is read once more.

    Raises:
        LogUnavailable: it was spoilt again, and otherwise.
        LogUnreadable: it is so in the log.
    """
    try:
        return await read()
    except LogUnreadable as error:
        first = str(error)
    try:
        return await read()
    except LogUnreadable as error:
        if str(error) == first:
            raise
        raise LogUnavailable(f"it arrived garbled, and again: {error}") from error


def drafts_of(entries: Sequence[Entry], command: str, actor: str, job_id: UUID) -> list[Draft]:
    """The entries of one command about a job, in envelopes of now; the same command makes the same ids."""
    now, trace, correlated = datetime.now(UTC), traceparent(), correlation(str(job_id))
    return [
        Draft(
            entry.event,
            Meta(
                id=event_id(command, nth),
                at=now,
                actor=actor,
                correlation=correlated,
                causation=command,
                traceparent=trace,
            ),
            entry.boundary,
            entry.expected,
        )
        for nth, entry in enumerate(entries)
    ]


def _recorded(message: Msg) -> Recorded:
    """The event in an answer of the direct-get API.

    Raises:
        LogUnavailable: the headers, which the server adds to, were spoilt on their way.
        LogUnreadable: it cannot be decoded.
    """
    given = message.headers or {}
    try:
        seq, subject = int(given["Nats-Sequence"]), given["Nats-Subject"]
    except (KeyError, ValueError) as error:
        raise LogUnavailable(f"an answer does not say which event it holds: {error!r}") from error
    return open_envelope(seq, subject, given, message.data)


def _arrived(message: Msg) -> datetime:
    given = message.headers or {}
    try:
        return datetime.fromisoformat(given.get(ARRIVED) or _TIME.sub(r"\1\2", given["Nats-Time-Stamp"]))
    except (KeyError, ValueError) as error:
        raise LogUnavailable(f"an answer does not say when its event arrived: {error!r}") from error


def _position(batch: str, nth: int, *, commit: bool = False) -> dict[str, str]:
    made = {"Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(nth)}
    return made | {"Nats-Batch-Commit": "1"} if commit else made


def _check(drafts: Sequence[Draft], subjects: list[str]) -> None:
    """A filter that covers nothing is accepted by the server in silence, so it is refused here."""
    if not drafts or len(drafts) > MAX_BATCH:
        raise ValueError(f"an append takes 1 to {MAX_BATCH} events, not {len(drafts)}")
    boundaries = [draft.boundary for draft in drafts if draft.boundary is not None]
    if not boundaries:
        raise ValueError("an append names at least one boundary and the sequence its decision saw")
    if len(set(boundaries)) != len(boundaries):
        raise ValueError("only the first event of a boundary carries its expectation")
    for draft, where in zip(drafts, subjects, strict=True):
        if draft.boundary not in (None, where) and not matches(draft.boundary, where):
            raise ValueError(f"the boundary {draft.boundary} does not cover {where}")
