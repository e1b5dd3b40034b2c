"""The scheduler: at a fixed pace takes samples of disk, memory and queue, says when the disk crosses a line,
gives up what has expired, and looks for what does not belong together: temporary files, files without a row,
rows without their file.

It never changes a table: samples go to the metrics stream, and the projector makes ``resource_usage_log`` of
them; what has expired is said by events.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

import asyncpg
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from nats.aio.client import Client

from forge.broker import exchange
from forge.database import Pool, answering
from forge.domain.ids import new_id
from forge.domain.retention import DAMAGED, EXPIRED, LOST, ORPHANED, TEMPORARY
from forge.errors import ForgeError, StoreFailed
from forge.events.catalogue import encode
from forge.events.envelope import Meta, headers
from forge.events.system import MetricSampled
from forge.resources import Capacity, memory_bytes
from forge.retention import Retention
from forge.settings import Settings
from forge.store import Store
from forge.topology import subject
from forge.uploads import Uploads
from forge.workers import uploads
from forge.workers.crossings import Crossings
from forge.workers.leftovers import Leftovers

log = logging.getLogger("forge.scheduler")

ACTOR = "scheduler"
_STRAY_SCANS = 60  # a file that no upload has for so many scans never will have one
_LOOKING_IS_A_PART = 20
"""Of the time at most: a large volume is looked through less often."""

_BYTES_BY_TYPE = "select asset_type, sum(file_size_bytes)::bigint as bytes from asset_inventory group by 1"
_JOBS_BY_STATUS = """
select status, count(*) as jobs from generation_queue where status in ('pending', 'running') group by 1
"""

_NAMES = {"thumbs": "thumbnails", "tmp": "temporary"}


class Scheduler:
    """One role of a worker process; samples of two of them are only more samples."""

    def __init__(
        self, nc: Client, pool: Pool, store: Store, settings: Settings, retention: Retention
    ) -> None:
        self.nc, self.pool, self.store, self.settings = nc, pool, store, settings
        self.capacity = Capacity(settings)
        self.crossings = Crossings(retention.events, self.capacity.lines, settings.scan_seconds)
        self.uploads = Uploads(retention.events)
        self.leftovers = Leftovers(retention.events, settings.comfyui_urls, settings.comfyui_dirs)
        self.retention = retention
        self._look_again = 0.0

    async def run(self, stop: asyncio.Event) -> None:
        """Sample and sweep at once, then every ``FORGE_SCAN_SECONDS``, until ``stop`` is set."""
        clock = AsyncIOScheduler(
            timezone=UTC, job_defaults={"coalesce": True, "misfire_grace_time": None, "max_instances": 1}
        )
        pace = self.settings.scan_seconds
        duties = (
            self.sample,
            self.watch,
            self.sweep,
            self.expire,
            self.look,
            self.expire_uploads,
            self.leftovers.sweep,
        )
        for duty in duties:
            clock.add_job(duty, "interval", seconds=pace, next_run_time=datetime.now(UTC))
        clock.add_job(
            self.sweep_uploads, "interval", seconds=_STRAY_SCANS * pace, next_run_time=datetime.now(UTC)
        )
        clock.start()
        try:
            await stop.wait()
        finally:
            clock.shutdown(wait=False)

    async def sample(self) -> None:
        """Take one round of samples and publish them; a server that is away costs the round, not more."""
        try:
            for event in await self._samples():
                meta = Meta(id=new_id(), at=datetime.now(UTC), actor="scheduler", correlation="")
                where = subject(event)
                await exchange(self.nc, where, encode(event), headers(event, meta, where), 2.0)
        except (ForgeError, OSError) as error:
            log.warning("no sample this time", extra={"error": str(error)})

    async def watch(self) -> None:
        """Say in the log which lines the use of the disk has crossed since the last look."""
        try:
            await self.crossings.look(self.capacity.measured)
        except ForgeError as error:
            log.warning("no look at the disk this time", extra={"error": error.detail})

    async def sweep(self) -> None:
        """Remove the temporary files of workers that died."""
        try:
            swept = await asyncio.to_thread(self.store.sweep, self.settings.scan_seconds)
        except StoreFailed as error:
            log.warning("no sweep this time", extra={"error": error.detail})
        else:
            if swept:
                log.info("swept", extra={"leftovers": swept})

    async def expire_uploads(self) -> None:
        """Say of uploads whose time is up that they expired."""
        try:
            ended = await uploads.expire_due(self.pool, self.uploads, datetime.now(UTC))
        except ForgeError as error:
            log.warning("no upload expires this time", extra={"error": error.detail})
        else:
            if ended:
                log.info("uploads expired", extra={"uploads": ended})

    async def sweep_uploads(self) -> None:
        """Remove the files of uploads that their API died over."""
        stale = _STRAY_SCANS * self.settings.scan_seconds
        try:
            swept = await uploads.remove_strays(
                self.pool, self.uploads, self.store, datetime.now(UTC), stale_seconds=stale
            )
        except ForgeError as error:
            log.warning("no stray upload is looked for this time", extra={"error": error.detail})
        else:
            if swept:
                log.info("swept uploads", extra={"files": swept})

    async def expire(self) -> None:
        """Give up what is past its time; doubt or an absent server costs the round, not more."""
        try:
            went = await self.retention.sweep(EXPIRED, actor=ACTOR)
        except (ForgeError, OSError) as error:
            log.warning("nothing expires this time", extra={"error": str(error)})
        else:
            if went:
                log.info("expired", extra={"assets": went[EXPIRED].assets})

    async def look(self) -> None:
        """Bring volume and tables together, and compare some more files with their hash."""
        began = time.monotonic()
        if began < self._look_again:
            return
        try:
            went = await self.retention.sweep(LOST, DAMAGED, ORPHANED, TEMPORARY, actor=ACTOR)
            await self.retention.scrub(actor=ACTOR)
        except (ForgeError, OSError) as error:
            log.warning("no look at the volume this time", extra={"error": str(error)})
        else:
            if went:
                log.info("brought together", extra={reason: tally.assets for reason, tally in went.items()})
        took = time.monotonic() - began
        self._look_again = began + took * _LOOKING_IS_A_PART

    async def _samples(self) -> list[MetricSampled]:
        async with answering():
            by_type = _counted(await self.pool.fetch(_BYTES_BY_TYPE))
            by_status = _counted(await self.pool.fetch(_JOBS_BY_STATUS))
        volume = await self.capacity.disk()
        kinds = await asyncio.to_thread(self.capacity.volume.kinds)
        details = {"limit": volume.limit, "free": volume.free, "by_type": by_kind(by_type, kinds)}
        return [
            _sampled("disk_usage", volume.used, "bytes", details),
            _sampled("memory_usage", memory_bytes(), "bytes", {}),
            _sampled("job_count", sum(by_status.values()), "jobs", {"by_status": by_status}),
        ]


def by_kind(by_type: dict[str, int], kinds: dict[str, int]) -> dict[str, int]:
    """Bytes of pictures by asset type, as the tables know them, and of all else by what the volume holds.

    ``unlisted`` are pictures on the volume that no table knows: about to be listed, about to go, or orphans.
    """
    rest = {_NAMES.get(folder, folder): size for folder, size in kinds.items() if folder != "assets"}
    unlisted = max(0, kinds.get("assets", 0) - sum(by_type.values()))
    return {**rest, **by_type, "unlisted": unlisted}


def _counted(rows: list[asyncpg.Record]) -> dict[str, int]:
    return {str(name): int(count) for name, count in rows}


def _sampled(metric_type: str, value: int, unit: str, details: dict[str, object]) -> MetricSampled:
    return MetricSampled(metric_type=metric_type, value=value, unit=unit, details=details)
