"""The closed part of the log: events that the stream has let go, read from the second copy in Postgres.

Whoever decides asks for it only about what closed events are about: of everything newer the stream knows all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

import asyncpg
import msgspec
from nats.aio.client import Client

from forge import database
from forge.broker import BrokerRefused, request
from forge.database import Connection, Pool, answering
from forge.domain.closing import Known
from forge.errors import DatabaseUnavailable, LogUnavailable, LogUnreadable
from forge.events.envelope import Recorded, open_envelope
from forge.topology import ALL_EVENTS, EVENTS, NOT_FOUND, matches

PAGE = 1000

_LONG = 60.0

_COLUMNS = "seq, subject, headers, data"
_INDEXED = ("job", "asset", "pin", "upload")
_SUBJECTS = "select subject from forge_log.entry where seq <= $1"


class _State(msgspec.Struct):
    first_seq: int


class _Info(msgspec.Struct):
    state: _State


async def find(nc: Client, pool: Pool) -> Closed | None:
    """What the stream does not have any more; None if it has everything from the first event on.

    Raises:
        LogUnavailable, DatabaseUnavailable: no answer. Without Postgres a log that was closed cannot be read.
    """
    try:
        info = msgspec.json.decode(await request(nc, f"STREAM.INFO.{EVENTS}"), type=_Info)
    except BrokerRefused as refused:
        if refused.err_code in NOT_FOUND:
            return None
        raise
    through = info.state.first_seq - 1
    if through < 1:
        return None
    async with answering(), pool.acquire() as connection:
        bits: bytes | None = await connection.fetchval(
            "select known from forge_log.closed where through >= $1 order by through limit 1", through
        )
        known = Known(bytearray(bits)) if bits is not None else await known_through(connection, through)
    return Closed(pool, through, known)


@asynccontextmanager
async def found(nc: Client, dsn: str) -> AsyncIterator[Closed | None]:
    """:func:`find`, over a pool of its own."""
    async with database.opened(dsn, most=4) as pool:
        yield await find(nc, pool)


async def known_through(connection: Connection, through: int) -> Known:
    """What all events of the copy up to one are about."""
    known, done = Known.of(through), 0
    async with connection.transaction(readonly=True):
        async for row in connection.cursor(_SUBJECTS, through, prefetch=10_000):
            known.add(row["subject"])
            done += 1
            if done % 10_000 == 0:
                await asyncio.sleep(0)
    return known


class Closed:
    """Events up to ``through``, which nobody can change."""

    def __init__(self, pool: Pool, through: int, known: Known) -> None:
        self.pool, self.through, self.known = pool, through, known

    async def newest(self, filter_: str, timeout: float = 2.0) -> list[Recorded]:
        """The last event of every subject a filter covers, in order.

        Raises:
            LogUnavailable: there may be some, and Postgres does not answer.
        """
        if not self.known.may_have(filter_):
            return []
        where, given = _where((filter_,), 2)
        rows = await self._rows(
            f"select distinct on (subject) {_COLUMNS} from forge_log.entry "
            f"where seq <= $1 and {where} order by subject, seq desc",
            self.through,
            *given,
            timeout=timeout,
        )
        return sorted(_recorded(rows, (filter_,)), key=lambda record: record.seq)

    async def last(self, filter_: str, timeout: float = 2.0) -> Recorded | None:
        """The newest event a filter covers.

        Raises:
            LogUnavailable: as :meth:`newest`.
        """
        if not self.known.may_have(filter_):
            return None
        where, given = _where((filter_,), 2)
        before = self.through + 1
        while True:
            rows = await self._rows(
                f"select {_COLUMNS} from forge_log.entry where seq < $1 and {where} "
                "order by seq desc limit 20",
                before,
                *given,
                timeout=timeout,
            )
            if not rows:
                return None
            for record in _recorded(rows, (filter_,)):
                return record
            before = rows[-1]["seq"]

    async def at(self, seq: int, timeout: float = 2.0) -> Recorded | None:
        """The event at one position.

        Raises:
            LogUnavailable: Postgres does not answer.
        """
        rows = await self._rows(
            f"select {_COLUMNS} from forge_log.entry where seq = $1", seq, timeout=timeout
        )
        return next(iter(_recorded(rows, (ALL_EVENTS,))), None)

    async def since(self, moment: datetime) -> Recorded | None:
        """The first event that arrived at this moment or later.

        Raises:
            LogUnavailable: Postgres does not answer.
        """
        rows = await self._rows(
            f"select {_COLUMNS} from forge_log.entry where seq <= $1 and arrived >= $2 order by seq limit 1",
            self.through,
            moment,
        )
        return next(iter(_recorded(rows, (ALL_EVENTS,))), None)

    async def pages(self, start: int, filters: Sequence[str]) -> AsyncIterator[list[Recorded]]:
        """All events that filters cover from a sequence on, in order.

        Raises:
            LogUnreadable: an event cannot be decoded; everything before it was handed over.
            LogUnavailable: Postgres does not answer.
        """
        where, given = _where(filters, 4)
        while True:
            rows = await self._rows(
                f"select {_COLUMNS} from forge_log.entry where seq >= $1 and seq <= $2 and ({where}) "
                "order by seq limit $3",
                start,
                self.through,
                PAGE,
                *given,
            )
            if not rows:
                return
            page: list[Recorded] = []
            try:
                page.extend(_recorded(rows, filters))
            except LogUnreadable:
                page = []
                for row in rows:
                    try:
                        page.extend(_recorded([row], filters))
                    except LogUnreadable:
                        yield page
                        raise
            yield page
            start = rows[-1]["seq"] + 1

    async def _rows(self, sql: str, *given: object, timeout: float = _LONG) -> list[asyncpg.Record]:
        try:
            async with answering(), asyncio.timeout(timeout), self.pool.acquire() as connection:
                return await connection.fetch(sql, *given, timeout=timeout)
        except DatabaseUnavailable as error:
            raise LogUnavailable(f"the closed part of the log cannot be read: {error.detail}") from error


def _recorded(rows: Sequence[asyncpg.Record], filters: Sequence[str]) -> list[Recorded]:
    return [
        open_envelope(row["seq"], row["subject"], row["headers"], row["data"])
        for row in rows
        if any(matches(filter_, row["subject"]) for filter_ in filters)
    ]


def _where(filters: Sequence[str], first: int) -> tuple[str, list[str]]:
    """A condition that finds everything filters cover, and perhaps a little more; its parameters begin at
    ``$first``."""
    said: list[str] = []
    given: list[str] = []

    def parameter(value: str) -> str:
        given.append(value)
        return f"${first + len(given) - 1}"

    for filter_ in _plain(filters):
        tokens = filter_.split(".")
        wild = next((nth for nth, token in enumerate(tokens) if token in ("*", ">")), None)
        if wild is None:
            said.append(f"subject = {parameter(filter_)}")
            continue
        begin = "".join(f"{token}." for token in tokens[:wild])
        for sign in "\\_%":
            begin = begin.replace(sign, "\\" + sign)
        parts = [f"subject like {parameter(begin + '%')}"]
        parts += [f"split_part(subject, '.', 3) = '{tokens[2]}'"] if tokens[2] in _INDEXED else []
        parts += [
            f"split_part(subject, '.', {nth + 1}) = {parameter(token)}"
            for nth, token in enumerate(tokens)
            if nth > wild and token not in ("*", ">")
        ]
        said.append(" and ".join(parts))
    return " or ".join(f"({one})" for one in said), given


def _plain(filters: Sequence[str]) -> list[str]:
    """Filters over assets and their pins at once (``forge.evt.*.…``) as two, each with a beginning."""
    any_kind = "forge.evt.*."
    return [
        plain
        for filter_ in filters
        for plain in (
            [filter_.replace(any_kind, f"forge.evt.{kind}.", 1) for kind in ("asset", "pin")]
            if filter_.startswith(any_kind)
            else [filter_]
        )
    ]
