"""A library on real servers: pictures that really lie on a volume, their events, tables that follow."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from nats.aio.client import Client

from factories import job_id, meta, ready, stored
from forge.broker import request
from forge.canonical import Picture
from forge.database import Pool, opened
from forge.events.assets import AssetStored
from forge.eventstore import Draft, EventStore
from forge.plans import utc
from forge.projections.retention import checkpoint
from forge.retention import Retention
from forge.settings import Settings
from forge.store import Store
from forge.topology import CLEANUP, EVENTS, reference
from forge.workers import projector
from forge.workers.cleanup import Cleanup
from waiting import wait_until

HOUR = timedelta(hours=1)
_numbers = count(1)


def ago(hours: float) -> datetime:
    return datetime.now(UTC) - hours * HOUR


class House:
    """Everything that retention works with; nothing else runs but the projector."""

    def __init__(self, nc: Client, pool: Pool, settings: Settings) -> None:
        self.nc, self.pool, self.settings = nc, pool, settings
        self.events = EventStore(nc)
        self.store = Store(settings.assets_dir)
        self.store.open()

    def retention(self, clock: Any = utc, **changes: Any) -> Retention:
        settings = msgspec.structs.replace(self.settings, **changes)
        return Retention(self.events, self.pool, self.store, settings, clock)

    async def file(self, data: bytes, age_hours: float = 2) -> str:
        """A picture on the volume that nobody knows of; returns its hash."""
        content_hash = hashlib.sha256(data).hexdigest()
        async with self.store.workspace(f"made-{next(_numbers)}") as folder:
            (folder / "picture").write_bytes(data)
            (folder / "thumb").write_bytes(b"thumbnail")
            await self.store.keep(
                Picture(folder / "picture", "png", 1, 1, len(data), content_hash, content_hash, "#000000")
            )
            await self.store.keep_thumbnails(content_hash, "png", {256: folder / "thumb"})
        self.age(content_hash, age_hours)
        return content_hash

    def age(self, content_hash: str, hours: float) -> None:
        at = ago(hours).timestamp()
        for path in (self.path(content_hash), self.store.thumbnail_path(content_hash, 256)):
            os.utime(path, (at, at))

    def path(self, content_hash: str) -> Path:
        return self.store.path(content_hash, "png")

    async def asset(
        self, data: bytes, *, expires: datetime | None = None, user: str = "mei", **fields: Any
    ) -> AssetStored:
        """A stored picture: file, events, and the row when this returns."""
        content_hash = await self.file(data)
        [one] = await self.refer([content_hash], len(data), expires=expires, user=user, **fields)
        return one

    async def refer(
        self,
        hashes: list[str],
        size: int,
        *,
        expires: datetime | None = None,
        user: str = "mei",
        **fields: Any,
    ) -> list[AssetStored]:
        """References of new jobs to contents."""
        made = []
        for content_hash in hashes:
            job = job_id(1000 + next(_numbers))
            event = stored(
                job,
                user,
                content_hash,
                file_size_bytes=size,
                **{"created_at": ago(2), "expires_at": expires or ago(-24)} | fields,
            )
            owned = {name: fields[name] for name in ("character_id", "asset_type") if name in fields}
            entry = ready(job, user, content_hash, **owned)
            where = reference(owned.get("character_id"), event.asset_type, event.asset_id, job)
            await self.events.append(
                [Draft(event, meta(f"store {job}")), Draft(entry, meta(f"store {job}", 1), where, 0)]
            )
            made.append(event)
        await self.projected()
        return made

    async def projected(self) -> None:
        head = await self.events.head()

        async def there() -> bool:
            async with self.pool.acquire() as connection:
                return await checkpoint(connection) >= head

        await wait_until(there, 60, f"the tables reach {head}")

    async def rows(self) -> set[str]:
        await self.projected()
        return {row[0] for row in await self.pool.fetch("select content_hash from asset_inventory")}

    def files(self) -> set[str]:
        return {file.content_hash for file in self.store.files()}

    async def facts(self, type_: type[Any]) -> list[Any]:
        """Every event of one type, in order."""
        records = [await self.events.at(seq) for seq in range(1, await self.events.head() + 1)]
        return [r.event for r in records if r is not None and isinstance(r.event, type_)]

    async def agree(self) -> None:
        """I-FILE: files = rows, and each file is what its name says."""

        async def same() -> bool:
            return self.files() == await self.rows()

        await wait_until(same, what="files are what rows tell of")
        for content_hash in self.files():
            assert hashlib.sha256(self.path(content_hash).read_bytes()).hexdigest() == content_hash
        assert list((self.store.root / "tmp").iterdir()) == []

    @asynccontextmanager
    async def cleaning(self, grace_seconds: float = 0.0, **changes: Any) -> AsyncIterator[Cleanup]:
        """The cleanup role, at work."""
        stop, role = asyncio.Event(), Cleanup(self.retention(**changes), grace_seconds)
        task = asyncio.create_task(role.run(stop))
        try:
            yield role
            stop.set()
            await asyncio.wait_for(task, 60)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def unhandled(self) -> int:
        """Events that the cleanup consumer has not done yet."""
        info = msgspec.json.decode(await request(self.nc, f"CONSUMER.INFO.{EVENTS}.{CLEANUP}"))
        return int(info["num_pending"] + info["num_ack_pending"])

    async def cleaned(self) -> None:
        """Wait until the cleanup role has nothing left to do."""

        async def done() -> bool:
            return await self.unhandled() == 0

        await wait_until(done, 60, "the cleanup consumer has nothing left")


@asynccontextmanager
async def house(nc: Client, settings: Settings) -> AsyncIterator[House]:
    """A house with its projector."""
    async with opened(settings.postgres_dsn) as pool:
        projecting = asyncio.create_task(projector.run(nc, pool))
        try:
            yield House(nc, pool, settings)
        finally:
            projecting.cancel()
            await asyncio.gather(projecting, return_exceptions=True)
