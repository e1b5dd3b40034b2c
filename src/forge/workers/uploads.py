"""What becomes of uploads that nobody uses: time up → event → grace → no other upload of it → unlink.

Whether a content is still needed is read from the log, never from the table: an empty table removes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime

from forge.database import Pool, answering
from forge.domain.uploads import too_many_strays
from forge.events.envelope import Recorded
from forge.events.uploads import UploadExpired
from forge.projections import uploads as table
from forge.store import Store
from forge.uploads import Uploads

log = logging.getLogger("forge.uploads")

_AT_ONCE = 1000
_ACTOR = "scheduler"


async def expire_due(pool: Pool, uploads: Uploads, now: datetime) -> int:
    """End the uploads whose time is up, some at a time; how many that were.

    The table proposes and the log decides, so a table that is behind ends nothing that was just used.

    Raises:
        DatabaseUnavailable, LogUnavailable: the rest is for the next time.
    """
    async with answering(), pool.acquire() as connection:
        proposed = await table.due(connection, now, _AT_ONCE)
    ended = [await uploads.expire(user, id_, now, actor=_ACTOR) for user, id_ in proposed]
    return sum(ended)


async def unlink(record: Recorded, uploads: Uploads, store: Store) -> bool:
    """Remove the file of an upload that expired, unless another upload has its content; whether it went.

    Call it after the grace, in which an attempt that has just begun may still read the file.

    Raises:
        LogUnavailable, StoreFailed: nothing is removed.
    """
    assert isinstance(record.event, UploadExpired)
    content_hash = record.event.content_hash
    if await uploads.referred(content_hash):
        return False
    return await store.remove(content_hash, "png", "uploads", untouched_since=record.meta.at.timestamp())


async def remove_strays(
    pool: Pool, uploads: Uploads, store: Store, now: datetime, *, stale_seconds: float
) -> int:
    """Remove files older than ``stale_seconds`` that no upload has: their API died before it told the log.

    Raises:
        DatabaseUnavailable, LogUnavailable, StoreFailed: the rest is for the next time.
    """
    before = now.timestamp() - stale_seconds
    total, old = await asyncio.to_thread(_older, store, before)
    strays = [
        content_hash for content_hash in await _unknown(pool, old) if not await uploads.referred(content_hash)
    ]
    if too_many_strays(len(strays), total):
        log.error("no strays removed: too many at once", extra={"strays": len(strays), "files": total})
        return 0
    gone = [await store.remove(stray, "png", "uploads", untouched_since=before) for stray in strays]
    return sum(gone)


def _older(store: Store, before: float) -> tuple[int, list[str]]:
    """How many files there are, and the contents of those last kept before that moment."""
    total, old = 0, list[str]()
    for file in store.files("uploads"):
        total += 1
        if file.modified_at < before:
            old.append(file.content_hash)
    return total, old


async def _unknown(pool: Pool, hashes: list[str]) -> list[str]:
    """Those that no row of the table has: only of these the log is asked."""
    unknown: list[str] = []
    for at in range(0, len(hashes), _AT_ONCE):
        some = hashes[at : at + _AT_ONCE]
        async with answering(), pool.acquire() as connection:
            known = await table.known(connection, some)
        unknown += [content_hash for content_hash in some if content_hash not in known]
    return unknown
