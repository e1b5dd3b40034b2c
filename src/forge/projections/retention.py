"""What the tables know about what may go: what is due, what is least used, who still refers to what."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

import asyncpg
import msgspec

from forge.database import Connection
from forge.domain.retention import Claim, Kept

# One row for each job's references to an asset, none of them pinned.
_CLAIMS = """
select r.asset_id, r.job_id, a.asset_type, min(r.user_id) as user_id, min(r.session_id) as session_id,
       min(r.character_id) as character_id, a.content_hash, a.format, count(*) as pictures,
       a.file_size_bytes as size_bytes
from asset_reference r join asset_inventory a on a.id = r.asset_id
where not r.pinned {condition}
group by r.asset_id, r.job_id, a.id
order by min(r.{order}), r.asset_id, r.job_id limit ${limit}
"""

_WHOSE = """
  and ($1::text is null or r.user_id = $1) and ($2::text is null or a.asset_type = $2)
  and ($3::timestamptz is null or r.created_at <= $3)
"""

_DUE = _CLAIMS.format(
    condition=f"""
  and r.expires_at <= $4 and (
      $5::interval = interval '0' or a.last_accessed_at is null or a.last_accessed_at + $5 <= $4
  ){_WHOSE}""",
    order="expires_at",
    limit=6,
)
_OLD = _CLAIMS.format(condition=_WHOSE, order="created_at", limit=4)
_OF = _CLAIMS.format(condition="and r.asset_id = any($1::uuid[])", order="created_at", limit=2)

_LEAST_USED = """
(select id, file_size_bytes as size_bytes, created_at, last_accessed_at, expires_at, pinned
 from asset_inventory where not pinned and expires_at <= $1
   and ($2::text is null or asset_type = $2) and ($3::timestamptz is null or created_at <= $3)
 order by expires_at, id limit $4)
union
(select id, file_size_bytes, created_at, last_accessed_at, expires_at, pinned
 from asset_inventory where not pinned
   and ($2::text is null or asset_type = $2) and ($3::timestamptz is null or created_at <= $3)
 order by coalesce(last_accessed_at, created_at), id limit $4)
"""

_TOTAL = "select count(*) as assets, coalesce(sum(file_size_bytes), 0)::bigint as bytes from asset_inventory"

_ROWS = """
select id, asset_type, content_hash, format, file_size_bytes, pinned, seq from asset_inventory
where content_hash > $1 order by content_hash limit $2
"""

_CHECKPOINT = "select seq from projection_checkpoint where projection = 'inventory'"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A content that should lie on the volume."""

    id: UUID
    asset_type: str
    content_hash: str
    format: str
    file_size_bytes: int
    pinned: bool
    seq: int


async def due(
    connection: Connection,
    now: datetime,
    use_extends: timedelta,
    owner: str | None,
    asset_type: str | None,
    before: datetime | None,
    limit: int,
) -> list[Claim]:
    """Claims whose time is over, the longest over first."""
    return _claims(await connection.fetch(_DUE, owner, asset_type, before, now, use_extends, limit))


async def old(
    connection: Connection, owner: str | None, asset_type: str | None, before: datetime, limit: int
) -> list[Claim]:
    """Claims made before a moment, the oldest first."""
    return _claims(await connection.fetch(_OLD, owner, asset_type, before, limit))


async def claims_of(connection: Connection, assets: Sequence[UUID], limit: int) -> list[Claim]:
    """All claims on some assets."""
    return _claims(await connection.fetch(_OF, assets, limit))


async def least_used(
    connection: Connection, now: datetime, asset_type: str | None, before: datetime | None, limit: int
) -> list[Kept]:
    """Candidates to make room: up to ``limit`` that are expired, and as many that are least recently used."""
    rows = await connection.fetch(_LEAST_USED, now, asset_type, before, limit)
    return [Kept(**row) for row in rows]


async def total(connection: Connection) -> tuple[int, int]:
    """How many assets there are, and their bytes."""
    row = await connection.fetchrow(_TOTAL)
    assert row is not None
    return row["assets"], row["bytes"]


async def rows(connection: Connection, after: str, limit: int) -> list[Row]:
    """Contents in order of hash behind ``after``."""
    return [Row(**row) for row in await connection.fetch(_ROWS, after, limit)]


async def known(connection: Connection, hashes: Sequence[str]) -> set[str]:
    """Which of these contents have a row."""
    found = await connection.fetch(
        "select content_hash from asset_inventory where content_hash = any($1::text[])", hashes
    )
    return {row["content_hash"] for row in found}


async def checkpoint(connection: Connection) -> int:
    """The last event of the log that the inventory tells of."""
    return await connection.fetchval(_CHECKPOINT) or 0


async def clock(connection: Connection) -> datetime:
    """What time Postgres has."""
    now: datetime = await connection.fetchval("select clock_timestamp()")
    return now


def _claims(rows: list[asyncpg.Record]) -> list[Claim]:
    return [Claim(**row) for row in rows]
