"""The scheduler's duties of keeping the library: at its pace, twice at once, and in doubt not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client

from forge import database
from forge.events.assets import AssetDeleted, AssetExpired, AssetLost
from forge.plans import utc
from forge.retention import Retention
from forge.settings import Settings
from forge.store import MARKER
from forge.workers.scheduler import Scheduler
from keeping import House, ago, house
from waiting import wait_until


@pytest.fixture
async def home(nats_client: Client, settings: Settings) -> AsyncIterator[House]:
    quick = msgspec.structs.replace(settings, scan_seconds=0.2, orphan_grace_seconds=3600.0)
    async with house(nats_client, quick) as home:
        yield home


@asynccontextmanager
async def scheduling(home: House, clock: Any = utc) -> AsyncIterator[Scheduler]:
    stop = asyncio.Event()
    role = Scheduler(home.nc, home.pool, home.store, home.settings, home.retention(clock))
    task = asyncio.create_task(role.run(stop))
    try:
        yield role
    finally:
        stop.set()
        await asyncio.wait_for(task, 60)


async def test_what_is_due_expires_by_itself_and_its_file_follows(home: House) -> None:
    due, kept = await home.asset(b"due", expires=ago(1)), await home.asset(b"kept")
    async with home.cleaning(), scheduling(home), scheduling(home):
        await wait_until(lambda: home.files() == {kept.content_hash}, 60, "the file is gone")
        await home.cleaned()
    assert [gone.asset_id for gone in await home.facts(AssetExpired)] == [due.asset_id]
    await home.agree()


async def test_rows_and_files_are_brought_together_while_others_work(home: House) -> None:
    kept, lost = await home.asset(b"kept"), await home.asset(b"lost")
    await home.file(b"orphan")
    home.path(lost.content_hash).unlink()
    async with home.cleaning(), home.store.workspace("at-work") as busy, scheduling(home), scheduling(home):
        (busy / "half").write_bytes(b"half a picture")

        async def together() -> bool:
            return home.files() == await home.rows() == {kept.content_hash}

        await wait_until(together, 60, "rows = files")
        assert (busy / "half").exists()
        await home.cleaned()
    assert [gone.reason for gone in await home.facts(AssetDeleted)] == ["lost"]
    assert len(await home.facts(AssetLost)) == 1
    await home.agree()


@pytest.mark.parametrize("days", [-8, 8])
@pytest.mark.fault("T1")
async def test_a_wrong_clock_costs_the_rounds_and_nothing_else(home: House, days: int) -> None:
    await home.asset(b"due", expires=ago(1))
    await home.asset(b"in seven days", expires=ago(-7 * 24))
    await home.file(b"orphan", 9 * 24)
    asked = list[int]()

    def clock() -> datetime:
        asked.append(1)
        return utc() + timedelta(days=days)

    async with scheduling(home, clock):
        await wait_until(lambda: len(asked) > 6, what="some rounds went by")
    assert len(await home.rows()) == 2
    assert len(home.files()) == 3


async def test_a_look_that_took_long_is_repeated_late(home: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge.workers import scheduler

    now = [100.0]
    monkeypatch.setattr(scheduler.time, "monotonic", lambda: now[0])
    role = Scheduler(home.nc, home.pool, home.store, home.settings, home.retention())
    looks = list[float]()

    async def slow(*_: str, **__: str) -> dict[str, Any]:
        looks.append(now[0])
        now[0] += 3
        return {}

    async def nothing(**_: str) -> int:
        return 0

    role.retention.sweep, role.retention.scrub = slow, nothing  # type: ignore[assignment, method-assign]
    for at in (100.0, 110.0, 159.0, 161.0):
        now[0] = at
        await role.look()
    assert looks == [100.0, 161.0]


async def test_servers_that_are_away_cost_the_round(home: House) -> None:
    async with database.opened("postgresql://postgres@127.0.0.1:1/nowhere") as nowhere:
        retention = Retention(home.events, nowhere, home.store, home.settings)
        role = Scheduler(home.nc, nowhere, home.store, home.settings, retention)
        await role.expire()
        await role.look()
    (home.store.root / MARKER).unlink()
    await Scheduler(home.nc, home.pool, home.store, home.settings, home.retention()).look()
