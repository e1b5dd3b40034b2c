"""The guard of the log: asked at every start, by the projector for every batch, and by ``/readyz``.

It compares what the stream says of itself with the events that Postgres remembers: checkpoints of the tables,
and the second copy. Whatever does not fit is refused before anything is decided on it.
"""

from __future__ import annotations

import asyncio
import logging

import asyncpg
import msgspec
from nats.aio.client import Client

from forge.broker import BrokerRefused, request
from forge.database import Connection, answering, connect
from forge.domain.closing import mark_of
from forge.domain.wholeness import Extent, Landmark, lacking, unlike
from forge.errors import DatabaseUnavailable, LogDamaged
from forge.eventstore import EventStore
from forge.topology import DISPATCH, EVENTS, NOT_FOUND

log = logging.getLogger("forge.guard")

CONNECT_SECONDS = 3.0

RESTORING = "forge_restoring"
"""In the metadata of a stream that a restore is filling: how far clean-ups were done in the one before it."""

# usage follows another stream
_CHECKPOINTS = "select projection, seq, event_id from projection_checkpoint where projection <> 'usage'"

_ENDS = """
select seq, headers ->> 'ce-id' as id from forge_log.entry
where seq in ((select min(seq) from forge_log.entry), (select max(seq) from forge_log.entry))
"""
_AT = "select seq, headers ->> 'ce-id' as id from forge_log.entry where seq = $1"

_NO_TABLES = (asyncpg.UndefinedTableError, asyncpg.UndefinedColumnError, asyncpg.InvalidSchemaNameError)


class _State(msgspec.Struct):
    first_seq: int
    last_seq: int
    num_deleted: int = 0


class _Config(msgspec.Struct):
    metadata: dict[str, str] = {}


class _Info(msgspec.Struct):
    state: _State
    config: _Config


_info = msgspec.json.Decoder(_Info)


async def extent(events: EventStore) -> Extent:
    """What the stream says of itself; one that is not there says what an empty one does.

    Raises:
        LogUnavailable: no answer.
    """
    try:
        info = _info.decode(await request(events.nc, f"STREAM.INFO.{events.stream}"))
    except BrokerRefused as refused:
        if refused.err_code not in NOT_FOUND:
            raise
        return Extent(0, 0)
    state = info.state
    told = info.config.metadata
    return Extent(state.first_seq, state.last_seq, state.num_deleted, RESTORING in told, mark_of(told))


async def readers(nc: Client) -> str:
    """Who follows the log or waits for work, in words; empty where no forge runs."""
    found: list[str] = []
    for stream in (EVENTS, DISPATCH):
        try:
            listed = msgspec.json.decode(await request(nc, f"CONSUMER.LIST.{stream}"))
        except BrokerRefused as refused:
            if refused.err_code in NOT_FOUND:
                continue
            raise
        names = [one["name"] for one in listed["consumers"] or () if one.get("num_waiting")]
        found += [f"{', '.join(names)} of {stream} is being read"] if names else []
    return "; ".join(found)


async def check(events: EventStore, connection: Connection | None) -> None:
    """Compare the log with what Postgres remembers; without a connection only with itself.

    Raises:
        LogDamaged: events are gone, or it is another log.
        LogUnavailable: no answer.
    """
    # before the stream is asked, so that it can only have more: a forge that runs writes and copies meanwhile
    remembered = await _checkpoints(connection) + await _copied(connection, _ENDS)
    there = await extent(events)
    wrong = lacking(there) or await _astray(connection, there)
    if wrong is None:
        landmarks = remembered + await _copied(connection, _AT, there.last)
        ends = {there.first, there.last} if there.last else set()
        looked = sorted(ends | {mark.seq for mark in landmarks if there.first <= mark.seq <= there.last})
        ids = dict(zip(looked, await asyncio.gather(*map(events.id_at, looked)), strict=True))
        wrong = unlike(there, landmarks, ids)
    if wrong is not None:
        raise LogDamaged(wrong)


async def at_start(events: EventStore, dsn: str) -> None:
    """:func:`check`, over a connection of its own, before streams are made where there are none.

    A server that cannot read a stream at all starts without it, and making it anew would overwrite it.

    Raises:
        LogDamaged: as there.
        DatabaseUnavailable: the log is empty, and nobody can say whether it always was.
        LogUnavailable: no answer.
    """
    try:
        async with answering():
            connection = await connect(dsn, timeout=CONNECT_SECONDS, command_timeout=CONNECT_SECONDS)
            try:
                await check(events, connection)
            finally:
                connection.terminate()
    except DatabaseUnavailable as error:
        if not (await extent(events)).last:
            raise DatabaseUnavailable(f"the log is empty; was it ever otherwise? {error.detail}") from error
        log.warning("the log is only compared with itself", extra={"error": error.detail})
        await check(events, None)


async def _checkpoints(connection: Connection | None) -> list[Landmark]:
    rows = await _rows(connection, _CHECKPOINTS)
    return [
        Landmark(f"the checkpoint of {row['projection']}", row["seq"], str(row["event_id"] or ""))
        for row in rows
        if row["seq"]
    ]


async def _astray(connection: Connection | None, there: Extent) -> str | None:
    """What of a closed log the copy has not, or has otherwise."""
    if connection is None or there.first <= 1:
        return None
    rows = await _rows(connection, "select chain from forge_log.entry where seq = $1", there.closed.through)
    if rows and rows[0]["chain"].hex() == there.closed.chain:
        return None
    return (
        f"its book is closed through event {there.closed.through}, and the second copy "
        f"{'has another event there' if rows else 'lacks it'}: restore it from a file of forge log export"
    )


async def _copied(connection: Connection | None, sql: str, *args: object) -> list[Landmark]:
    rows = await _rows(connection, sql, *args)
    return [Landmark("the second copy", row["seq"], row["id"] or "") for row in rows]


async def _rows(connection: Connection | None, sql: str, *args: object) -> list[asyncpg.Record]:
    """Nothing where the tables are not made yet."""
    if connection is None:
        return []
    try:
        return await connection.fetch(sql, *args)
    except _NO_TABLES:
        return []
