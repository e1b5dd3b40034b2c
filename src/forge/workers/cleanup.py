"""The cleanup consumer: unlinks the file of an asset that nobody refers to any more, makes room when the disk
crosses its line, and carries out the clean-ups that were asked for.

event → hidden (the projector drops the row) → grace → still no reference → unlink. A picture that is needed
again meanwhile is renewed before its event is written, so a renewed file is left alone: its event follows.
What dies on the way is delivered again, and every step may be done twice.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from datetime import timedelta

from forge.database import answering
from forge.domain.retention import EVICTED, rest_of_grace
from forge.errors import NothingDeletedNow
from forge.events.assets import AssetGivenUp
from forge.events.cleanup import CleanupRequested
from forge.events.envelope import Recorded
from forge.events.system import DiskCrossed
from forge.events.uploads import UploadExpired
from forge.plans import Wish
from forge.retention import Retention
from forge.telemetry import about
from forge.topology import CLEANUP, EVENTS
from forge.uploads import Uploads
from forge.workers import uploads
from forge.workers.loop import Delivery, Outcome, consume

log = logging.getLogger("forge.cleanup")

ACTOR = "cleanup"
SHORT_GRACE_SECONDS = 10.0
"""For what went to make room; longer than any conclusion takes from its file to its event."""

_REFERENCED = "select exists (select from asset_inventory where content_hash = $1)"


class Cleanup:
    """One role of a worker process; of two of them one has the delivery."""

    def __init__(self, retention: Retention, grace_seconds: float) -> None:
        self.retention, self.events = retention, retention.events
        self.grace_seconds = grace_seconds
        self._tables_told_at = -math.inf

    async def run(self, stop: asyncio.Event) -> None:
        """Handle one event after the other until ``stop`` is set."""
        await consume(self.events.nc, EVENTS, CLEANUP, self.handle, stop)

    async def handle(self, delivery: Delivery) -> Outcome:
        """Do what one event asks for; RELEASE when it cannot be known yet whether that is right."""
        record = await self.events.at(delivery.sequence)
        if record is not None:
            about(correlation=record.meta.correlation)
        match record.event if record else None:
            case AssetGivenUp() as gone:
                assert record is not None
                return await self._unlink(gone, record, delivery)
            case UploadExpired() as ended:
                assert record is not None
                await self._grace_over(self.grace_seconds, delivery)
                went = await uploads.unlink(record, Uploads(self.events), self.retention.store)
                log.info("unlinked upload", extra={"content_hash": ended.content_hash, "went": went})
            case DiskCrossed(level="clean", above=True) as crossed:
                await self.retention.make_room(
                    delivery.sequence, crossed.used_bytes, crossed.limit_bytes, actor=ACTOR
                )
            case CleanupRequested(executor="cleanup") as asked:
                await self._carry_out(asked)
        return Outcome.DONE

    async def _unlink(self, gone: AssetGivenUp, record: Recorded, delivery: Delivery) -> Outcome:
        """Wait out the grace, then unlink what nobody refers to, as far as the log goes by then."""
        grace = self.grace_seconds
        if gone.reason == EVICTED:
            grace = min(grace, SHORT_GRACE_SECONDS)
        ended = await self._grace_over(grace, delivery)
        try:
            await self._tables_tell(ended)
        except NothingDeletedNow:
            return Outcome.RELEASE
        async with answering():
            referenced = await self.retention.pool.fetchval(_REFERENCED, gone.content_hash)
        if not referenced:
            # the earlier of two clocks: a file that was touched since by either stays
            since = min(record.meta.at, delivery.at).timestamp()
            went = await self.retention.store.remove(gone.content_hash, gone.format, untouched_since=since)
            log.info("unlinked", extra={"content_hash": gone.content_hash, "went": went})
        return Outcome.DONE

    async def _grace_over(self, grace: float, delivery: Delivery) -> float:
        """Wait out the grace; when it ended at the latest, on this process's steady clock."""
        rest = await self._left_of_grace(grace, delivery)
        ended = time.monotonic() + rest
        await asyncio.sleep(max(0.0, rest))
        return ended

    async def _left_of_grace(self, grace: float, delivery: Delivery) -> float:
        """Measured by the log's server alone, so that no other clock can shorten it."""
        return rest_of_grace(timedelta(seconds=grace), delivery.at, (await self.events.state()).now)

    async def _tables_tell(self, moment: float) -> None:
        """Wait until the tables tell of all that was in the log at a moment.

        What was waited for once holds for every moment before. Otherwise a busy log, which the tables are
        always a little behind, would keep up each of many unlinks that are due.
        """
        now = time.monotonic()
        if moment > self._tables_told_at:
            await self.retention.planner.projected()
            self._tables_told_at = now

    async def _carry_out(self, asked: CleanupRequested) -> None:
        """What was shown to whoever asked, as far as it still is so; if it is more by now, nothing."""
        wish = Wish(
            reasons=tuple(asked.reasons),
            asset_type=asked.asset_type,
            before=asked.before,
            owner=asked.owner,
        )
        plan = await self.retention.planner.plan(wish, asked.asked_at)
        if plan.assets > asked.assets:
            await self.retention.hold(plan, actor=ACTOR)
            went = {}
        else:
            went = await self.retention.carry_out(plan, actor=ACTOR)
        await self.retention.finished(went, asked.request_id, actor=ACTOR)
