"""The cleanup consumer: unlinks the file of an asset that nobody refers to any more.

event → hidden (the projector drops the row) → grace → still no reference → unlink. A picture that is made
again meanwhile renews its file first, so a renewed file is left alone: its own event will follow.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta

from nats.aio.client import Client

from forge.database import Pool, answering
from forge.events.assets import AssetGivenUp
from forge.events.uploads import UploadExpired
from forge.eventstore import EventStore
from forge.store import Store
from forge.topology import CLEANUP, EVENTS
from forge.uploads import Uploads
from forge.workers import uploads
from forge.workers.loop import Delivery, Outcome, consume

log = logging.getLogger("forge.cleanup")

GRACE_SECONDS = 60.0

_REFERENCED = "select exists (select from asset_inventory where content_hash = $1)"
_CHECKPOINT = "select seq from projection_checkpoint where projection = 'inventory'"


class Cleanup:
    """One role of a worker process."""

    def __init__(
        self, nc: Client, events: EventStore, pool: Pool, store: Store, grace_seconds: float = GRACE_SECONDS
    ) -> None:
        self.nc, self.events, self.pool, self.store = nc, events, pool, store
        self.grace = timedelta(seconds=grace_seconds)

    async def run(self, stop: asyncio.Event) -> None:
        """Handle deletions one by one until ``stop`` is set."""
        await consume(self.nc, EVENTS, CLEANUP, self.handle, stop)

    async def handle(self, delivery: Delivery) -> Outcome:
        """Wait out the grace of one deletion, then unlink what is still unreferenced."""
        record = await self.events.at(delivery.sequence)
        if record is None or not isinstance(record.event, AssetGivenUp | UploadExpired):
            return Outcome.DONE
        due = record.meta.at + self.grace
        await asyncio.sleep(max(0.0, (due - datetime.now(UTC)).total_seconds()))
        if isinstance(record.event, UploadExpired):
            went = await uploads.unlink(record, Uploads(self.events), self.store)
            log.info("unlinked upload", extra={"content_hash": record.event.content_hash, "went": went})
            return Outcome.DONE
        if not await self._projected(record.seq):
            return Outcome.RELEASE
        async with answering():
            referenced = await self.pool.fetchval(_REFERENCED, record.event.content_hash)
        if not referenced:
            content_hash, fmt, deleted_at = record.event.content_hash, record.event.format, record.meta.at
            went = await self.store.remove(content_hash, fmt, untouched_since=deleted_at.timestamp())
            log.info("unlinked", extra={"content_hash": content_hash, "went": went})
        return Outcome.DONE

    async def _projected(self, seq: int, patience: float = 10.0) -> bool:
        """Whether the inventory knows this event; deciding by an older one could unlink too early."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            async with answering():
                if (await self.pool.fetchval(_CHECKPOINT) or 0) >= seq:
                    return True
            await asyncio.sleep(0.1)
        return False
