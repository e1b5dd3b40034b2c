"""The scheduler on real servers: samples of what there is; crossings even without a database."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgspec
import pytest
from nats.aio.client import Client

from forge import database
from forge.database import Pool
from forge.events.system import DiskCrossed, MetricSampled
from forge.eventstore import EventStore
from forge.retention import Retention
from forge.settings import Settings
from forge.store import Store
from forge.topology import DISK_CROSSED, METRICS
from forge.workers.scheduler import Scheduler, by_kind


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[Pool]:
    async with database.opened(settings.postgres_dsn) as pool:
        yield pool


def scheduler(nc: Client, pool: Pool, settings: Settings, limit: int) -> Scheduler:
    store = Store(settings.assets_dir)
    store.open()
    small = msgspec.structs.replace(settings, disk_limit_bytes=limit)
    return Scheduler(nc, pool, store, small, Retention(EventStore(nc), pool, store, small))


def test_what_is_not_a_picture_of_a_known_type_has_a_name_too() -> None:
    kinds = {"assets": 1000, "thumbs": 50, "tmp": 7, "uploads": 3}
    assert by_kind({"ui_icon": 600, "npc_bust": 300}, kinds) == {
        "ui_icon": 600,
        "npc_bust": 300,
        "thumbnails": 50,
        "temporary": 7,
        "uploads": 3,
        "unlisted": 100,
    }
    assert by_kind({"ui_icon": 600}, {})["unlisted"] == 0, "rows whose files are gone are not room"


async def test_a_round_of_samples_tells_of_disk_memory_and_jobs(
    nats_client: Client, pool: Pool, settings: Settings
) -> None:
    one = scheduler(nats_client, pool, settings, 1000)
    thumbnail = settings.assets_dir / "thumbs" / "small.webp"
    thumbnail.write_bytes(bytes(300))
    await one.sample()
    metrics = EventStore(nats_client, METRICS)
    found = {}
    for name in ("disk_usage", "memory_usage", "job_count"):
        record = await metrics.last(f"forge.metric.{name}")
        assert record is not None
        assert isinstance(record.event, MetricSampled)
        found[name] = record.event
    disk = found["disk_usage"]
    assert (disk.value, disk.unit, disk.details["limit"], disk.details["free"]) == (300, "bytes", 1000, 700)
    assert disk.details["by_type"] == {"thumbnails": 300, "temporary": 0, "uploads": 0, "unlisted": 0}
    assert found["memory_usage"].value > 10_000_000
    assert found["job_count"].details == {"by_status": {}}


async def test_crossings_are_said_while_the_database_is_away(
    nats_client: Client, pool: Pool, settings: Settings, events: EventStore
) -> None:
    one = scheduler(nats_client, pool, settings, 1000)
    await pool.close()
    (settings.assets_dir / "thumbs" / "small.webp").write_bytes(bytes(850))
    await one.watch()
    await one.watch()
    newest = await events.last(DISK_CROSSED)
    assert newest is not None
    assert newest.event == DiskCrossed(level="warn", above=True, used_bytes=850, limit_bytes=1000)
    assert newest.seq == 1


async def test_a_volume_that_is_away_costs_a_look_and_no_more(
    nats_client: Client, pool: Pool, settings: Settings, events: EventStore
) -> None:
    one = scheduler(nats_client, pool, settings, 1000)
    settings.assets_dir.rename(settings.assets_dir.with_name("elsewhere"))
    await one.watch()
    await one.sample()
    assert await events.last(DISK_CROSSED) is None
