"""``upload``: the pictures that users sent and that are there to be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from uuid import UUID

import asyncpg

from forge.database import Connection
from forge.events.envelope import Recorded
from forge.events.uploads import UploadExpired, UploadRenewed, UploadStored
from forge.projections.projection import Change, Create, Projection, Put, Run, Table

TABLE = Table("upload", ("id",))
uploads = Projection("uploads", version=1, tables=[TABLE])


@uploads.on(UploadStored)
def stored(event: UploadStored, record: Recorded) -> Iterable[Change]:
    yield Create(
        TABLE,
        {
            "id": event.upload_id,
            "user_id": event.user_id,
            "content_hash": event.content_hash,
            "file_path": event.file_path,
            "file_size_bytes": event.file_size_bytes,
            "width": event.width,
            "height": event.height,
            "created_at": event.created_at,
            "expires_at": event.expires_at,
            "seq": record.seq,
        },
    )


@uploads.on(UploadRenewed)
def renewed(event: UploadRenewed, record: Recorded) -> Iterable[Change]:
    yield Put(TABLE, {"id": event.upload_id, "expires_at": event.expires_at, "seq": record.seq})


@uploads.on(UploadExpired)
def expired(event: UploadExpired, _record: Recorded) -> Iterable[Change]:
    yield Run("delete from upload where id = any($1::uuid[])", event.upload_id, (event.upload_id,))


# -------------------------------------------------------------------- reading

_UPLOAD = "select * from upload where id = $1 and ($2::text is null or user_id = $2)"
_DUE = "select user_id, id from upload where expires_at <= $1 order by expires_at limit $2"
_KNOWN = "select content_hash from upload where content_hash = any($1)"
_STORED = """
select count(*) as uploads, coalesce(sum(bytes), 0)::bigint as bytes
from (select max(file_size_bytes) as bytes from upload group by content_hash) files
"""


async def upload(connection: Connection, id_: UUID, tenant: str | None) -> asyncpg.Record | None:
    """One upload, if it is the tenant's."""
    return await connection.fetchrow(_UPLOAD, id_, tenant)


async def due(connection: Connection, now: datetime, limit: int) -> list[tuple[str, UUID]]:
    """User and id of uploads whose time is up, the longest overdue first."""
    return [(row["user_id"], row["id"]) for row in await connection.fetch(_DUE, now, limit)]


async def known(connection: Connection, hashes: Sequence[str]) -> set[str]:
    """Those of the hashes that some upload has."""
    return {row["content_hash"] for row in await connection.fetch(_KNOWN, list(hashes))}


async def stored_bytes(connection: Connection) -> tuple[int, int]:
    """Files of uploads and their bytes; equal pictures of several users are one file."""
    row = await connection.fetchrow(_STORED)
    assert row is not None
    return row["uploads"], row["bytes"]
