"""The cleanup consumer on a real log, tables and volume: what is unlinked and not, what a kill leaves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.aio.client import Client

from factories import cleanup_requested, crossed, deleted, expired, job_id, meta
from forge.broker import request
from forge.domain.retention import BRAKE_FREE
from forge.errors import NothingDeletedNow
from forge.events.assets import AssetDeleted, AssetExpired, AssetStored
from forge.events.cleanup import CleanupFinished, CleanupHeld
from forge.eventstore import Draft
from forge.library import Library
from forge.settings import Settings
from forge.topology import CLEANUP, EVENTS, subject
from forge.workers.cleanup import SHORT_GRACE_SECONDS, Cleanup
from keeping import House, ago, house

DYING = Path(__file__).parent / "dying_cleanup.py"


@pytest.fixture
async def home(nats_client: Client, settings: Settings) -> AsyncIterator[House]:
    async with house(nats_client, settings) as home:
        yield home


@pytest.fixture
async def soon_again(nats_client: Client) -> None:
    """A dead worker's delivery comes again after a second, not thirty."""
    path = f"{EVENTS}.{CLEANUP}"
    config = msgspec.json.decode(await request(nats_client, f"CONSUMER.INFO.{path}"))["config"]
    config["ack_wait"] = int(1e9)
    await request(nats_client, f"CONSUMER.CREATE.{path}", {"stream_name": EVENTS, "config": config})


async def give_up(home: House, asset: AssetStored, make: Any = deleted) -> None:
    gone = make(
        asset.job_id,
        asset.user_id,
        asset.content_hash,
        file_size_bytes=asset.file_size_bytes,
        session_id=asset.session_id,
        character_id=asset.character_id,
    )
    await Library(home.events).give_up(gone, actor="test")


async def said(home: House, event: Any) -> int:
    where = subject(event)
    last = await home.events.last(where)
    [record] = await home.events.append(
        [Draft(event, meta(f"say {where} {last and last.seq}"), where, last.seq if last else 0)]
    )
    return record.seq


@pytest.mark.parametrize("make", [deleted, expired], ids=["deleted", "expired"])
async def test_the_file_goes_with_the_last_reference(home: House, make: Any) -> None:
    first = await home.asset(b"shared")
    [second] = await home.refer([first.content_hash], 6, user="lan")
    thumbnail = home.store.thumbnail_path(first.content_hash, 256)
    async with home.cleaning():
        await give_up(home, first, make)
        await home.cleaned()
        assert home.path(first.content_hash).exists()
        assert thumbnail.exists()
        await give_up(home, second, make)
        await home.cleaned()
    assert not home.path(first.content_hash).exists()
    assert not thumbnail.exists()
    await home.agree()


async def test_giving_up_twice_removes_once_and_harms_nothing(home: House) -> None:
    asset, other = await home.asset(b"gone"), await home.asset(b"kept")
    async with home.cleaning():
        for _ in range(3):
            await give_up(home, asset)
        await give_up(home, asset, expired)
        await home.cleaned()
    assert home.files() == {other.content_hash}
    await home.agree()


async def test_the_grace_is_waited_out_by_the_servers_clock(home: House) -> None:
    asset = await home.asset(b"gone")
    waited = asyncio.Event()
    async with home.cleaning(grace_seconds=30.0) as role:
        left = role._left_of_grace

        async def measured(*given: Any) -> float:
            seconds = await left(*given)
            assert 0 < seconds <= 30
            waited.set()
            return 0.0

        role._left_of_grace = measured  # type: ignore[method-assign]
        await give_up(home, asset)
        await asyncio.wait_for(waited.wait(), 30)
        await home.cleaned()
    assert home.files() == set()


async def test_what_made_room_has_a_short_grace(home: House) -> None:
    asked = list[float]()

    async def none_left(grace: float, *_: Any) -> float:
        asked.append(grace)
        return 0.0

    async with home.cleaning(grace_seconds=60.0) as role:
        role._left_of_grace = none_left  # type: ignore[method-assign]
        for reason in ("requested", "evicted"):
            await give_up(home, await home.asset(reason.encode()), partial(deleted, reason=reason))
        await home.cleaned()
    assert asked == [60.0, SHORT_GRACE_SECONDS]


# ----------------------------------------------------------------------- races


class Held:
    """A cleanup role that stops right before it unlinks, for others to act."""

    def __init__(self, role: Cleanup) -> None:
        self.there, self.go_on = asyncio.Event(), asyncio.Event()
        self.remove = role.retention.store.remove
        role.retention.store.remove = self  # type: ignore[method-assign]

    async def __call__(self, *given: Any, **more: Any) -> bool:
        self.there.set()
        await self.go_on.wait()
        return await self.remove(*given, **more)


@pytest.mark.fault("G1")
async def test_a_hit_between_the_look_and_the_unlink_keeps_the_file(home: House) -> None:
    """The hit renews the file first and writes its event after: at the worst possible moment."""
    asset = await home.asset(b"wanted")
    async with home.cleaning() as role:
        held = Held(role)
        await give_up(home, asset)
        await asyncio.wait_for(held.there.wait(), 30)
        assert await home.store.renew(asset.content_hash, "png")
        await home.refer([asset.content_hash], 6, user="lan")
        held.go_on.set()
        await home.cleaned()
    await home.agree()
    assert home.files() == {asset.content_hash}


async def test_a_hit_that_comes_too_late_is_told_so(home: House) -> None:
    asset = await home.asset(b"gone")
    async with home.cleaning():
        await give_up(home, asset)
        await home.cleaned()
    assert not await home.store.renew(asset.content_hash, "png")
    await home.agree()


@pytest.mark.fault("G1")
async def test_the_same_picture_made_again_in_the_grace_stays(home: House) -> None:
    asset, made = await home.asset(b"again"), asyncio.Event()

    async def until_made(*_: Any) -> float:
        await made.wait()
        return 0.0

    async with home.cleaning(grace_seconds=30.0) as role:
        role._left_of_grace = until_made  # type: ignore[method-assign]
        await give_up(home, asset)
        await home.asset(b"again", user="lan")  # its file is as old as the first one's
        made.set()
        await home.cleaned()
    await home.agree()
    assert home.files() == {asset.content_hash}


@pytest.mark.fault("G1")
async def test_a_reference_written_during_the_grace_is_seen_however_late_the_tables_are(home: House) -> None:
    asset = await home.asset(b"late")
    async with home.pool.acquire() as connection:
        role = Cleanup(home.retention(), 0.0)
        waits, stop = asked_of(role), asyncio.Event()
        async with connection.transaction():
            # the tables stop here; the log goes on
            await connection.execute("select * from projection_checkpoint for update")
            await give_up(home, asset)
            again = job_id(7)
            await said_stored(home, asset, again)
            task = asyncio.create_task(role.run(stop))
            await asyncio.wait_for(waits.get(), 30)
            assert home.path(asset.content_hash).exists()
        await home.cleaned()
        stop.set()
        await asyncio.wait_for(task, 60)
    assert home.files() == {asset.content_hash}
    await home.agree()


async def said_stored(home: House, asset: AssetStored, job: Any) -> None:
    event = msgspec.structs.replace(asset, job_id=job)
    where = subject(event)
    last = await home.events.last(where)
    await home.events.append([Draft(event, meta("stored again"), where, last.seq if last else 0)])


async def test_of_many_graces_that_are_over_the_tables_are_waited_for_once(home: House) -> None:
    for asset in [await home.asset(b"%d" % number) for number in range(10)]:
        await give_up(home, asset)
    async with home.cleaning() as role:
        waits = asked_of(role)
        await home.cleaned()
    assert waits.qsize() <= 2, "once, or once more where the log's server answered late"
    assert home.files() == set()


async def test_what_was_waited_for_says_nothing_of_a_grace_that_ended_later(home: House) -> None:
    first, asset = await home.asset(b"first"), await home.asset(b"late")
    async with home.cleaning() as role:
        await give_up(home, first)
        await home.cleaned()
        waits = asked_of(role)
        async with home.pool.acquire() as connection, connection.transaction():
            # the tables stop here; the log goes on
            await connection.execute("select * from projection_checkpoint for update")
            await said_stored(home, asset, job_id(7))
            await give_up(home, asset)
            await asyncio.wait_for(waits.get(), 30)
        await home.cleaned()
    assert home.files() == {asset.content_hash}
    await home.agree()


def asked_of(role: Cleanup) -> asyncio.Queue[None]:
    """One entry for each time that the role waits for the tables from now on."""
    projected, waits = role.retention.planner.projected, asyncio.Queue[None]()

    async def noted(patience: float = 10.0) -> None:
        waits.put_nowait(None)
        await projected(patience)

    role.retention.planner.projected = noted  # type: ignore[method-assign]
    return waits


async def test_tables_that_are_behind_release_the_delivery_for_another_try(home: House) -> None:
    asset = await home.asset(b"waits")
    async with home.cleaning() as role:
        projected, tries = role.retention.planner.projected, list[int]()

        async def behind_at_first(patience: float = 10.0) -> None:
            tries.append(1)
            if len(tries) < 3:
                raise NothingDeletedNow("the tables are behind")
            await projected(patience)

        role.retention.planner.projected = behind_at_first  # type: ignore[method-assign]
        await give_up(home, asset)
        await home.cleaned()
    assert len(tries) == 3
    assert home.files() == set()


async def test_of_two_roles_one_has_the_delivery(home: House) -> None:
    assets = [await home.asset(b"%d" % number) for number in range(12)]
    async with home.cleaning(), home.cleaning():
        await asyncio.gather(*(give_up(home, asset) for asset in assets))
        await home.cleaned()
    assert home.files() == set()
    await home.agree()


# ---------------------------------------------------------- disk and requests


async def test_a_crossing_makes_room_down_to_the_target(home: House) -> None:
    assets = [await home.asset(b"picture %d" % number) for number in range(10)]
    size = assets[0].file_size_bytes
    limit = {"disk_limit_bytes": 10 * size, "disk_target_ratio": 0.5}
    async with home.cleaning(**limit):
        await said(home, crossed(level="warn", used_bytes=9 * size, limit_bytes=10 * size))
        await said(home, crossed(level="clean", above=False, used_bytes=9 * size, limit_bytes=10 * size))
        await home.cleaned()
        assert len(home.files()) == 10
        await said(home, crossed(level="clean", used_bytes=10 * size, limit_bytes=10 * size))
        await home.cleaned()
    assert len(await home.facts(AssetDeleted)) == 5
    await home.agree()
    [done] = await home.facts(CleanupFinished)
    assert done.assets == {"evicted": 5}


async def test_a_request_is_carried_out_as_it_was_shown(home: House) -> None:
    due = await home.asset(b"due", expires=ago(1))
    await home.asset(b"later")
    asked = cleanup_requested(asked_at=datetime.now(UTC), assets=1)
    async with home.cleaning():
        await said(home, asked)
        await home.cleaned()
    assert [gone.asset_id for gone in await home.facts(AssetExpired)] == [due.asset_id]
    [done] = await home.facts(CleanupFinished)
    assert (done.request_id, done.assets) == (asked.request_id, {"expired": 1})
    await home.agree()


async def test_a_request_never_takes_more_than_was_shown(home: House) -> None:
    for number in range(3):
        await home.asset(b"due %d" % number, expires=ago(1))
    async with home.cleaning():
        await said(home, cleanup_requested(asked_at=datetime.now(UTC), assets=2))
        await home.cleaned()
    assert await home.facts(AssetExpired) == []
    assert len(await home.facts(CleanupHeld)) == 1
    assert len(home.files()) == 3


async def test_what_a_command_carries_out_itself_is_not_done_twice(home: House) -> None:
    await home.asset(b"due", expires=ago(1))
    async with home.cleaning():
        await said(home, cleanup_requested(asked_at=datetime.now(UTC), executor="command"))
        await home.cleaned()
    assert await home.facts(AssetExpired) == []


# ----------------------------------------------------------------------- kills

STEPS = (
    "before the grace",
    "before the look",
    "before the unlink",
    "after the picture",
    "after the thumbnails",
    "before the ack",
)


def dies(home: House, step: str, **variables: str) -> None:
    """A cleanup worker that is killed at this step, as the kernel would."""
    worker = subprocess.run(
        [sys.executable, str(DYING), step],
        env={
            "FORGE_NATS_URL": home.settings.nats_url,
            "FORGE_POSTGRES_DSN": home.settings.postgres_dsn,
            "FORGE_DATA_DIR": str(home.settings.data_dir),
            "FORGE_CLEANUP_GRACE_SECONDS": "0",
            **variables,
        },
        timeout=100,
        check=False,
    )
    assert worker.returncode == -9, f"it did not come to {step}"


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.fault("G1")
@pytest.mark.usefixtures("soon_again")
async def test_killed_at_any_step_of_an_unlink_file_and_row_agree(home: House, step: str) -> None:
    kept, gone = await home.asset(b"kept"), await home.asset(b"gone")
    await give_up(home, gone)
    await asyncio.to_thread(dies, home, step)
    assert await home.unhandled() == 1
    async with home.cleaning():
        await home.cleaned()
    assert home.files() == {kept.content_hash}
    assert not home.store.thumbnail_path(gone.content_hash, 256).exists()
    await home.agree()


@pytest.mark.parametrize("step", STEPS[:3])
@pytest.mark.fault("G1")
@pytest.mark.usefixtures("soon_again")
async def test_killed_before_the_unlink_a_picture_that_is_made_again_stays(home: House, step: str) -> None:
    asset = await home.asset(b"again")
    await give_up(home, asset)
    await asyncio.to_thread(dies, home, step)
    await home.asset(b"again", user="lan")
    async with home.cleaning():
        await home.cleaned()
    await home.agree()
    assert home.files() == {asset.content_hash}


@pytest.mark.parametrize("step", ["after a third", "before the ack"])
@pytest.mark.usefixtures("soon_again")
async def test_killed_while_it_makes_room_it_takes_no_more_than_once(home: House, step: str) -> None:
    assets = [await home.asset(b"picture %d" % number) for number in range(10)]
    size = assets[0].file_size_bytes
    await said(home, crossed(level="clean", used_bytes=10 * size, limit_bytes=10 * size))
    limit = str(10 * size)
    await asyncio.to_thread(dies, home, step, FORGE_DISK_LIMIT_BYTES=limit, FORGE_DISK_TARGET_RATIO="0.4")
    async with home.cleaning(disk_limit_bytes=10 * size, disk_target_ratio=0.4):
        await home.cleaned()
    assert len(await home.facts(AssetDeleted)) == 6
    await home.agree()


@pytest.mark.usefixtures("soon_again")
async def test_killed_while_it_carries_out_a_request_it_goes_on(home: House) -> None:
    for number in range(BRAKE_FREE):
        await home.asset(b"due %d" % number, expires=ago(1))
    await home.asset(b"kept")
    await said(home, cleanup_requested(asked_at=datetime.now(UTC), assets=BRAKE_FREE))
    await asyncio.to_thread(dies, home, "after a third")
    async with home.cleaning():
        await home.cleaned()
    assert len(await home.facts(AssetExpired)) == BRAKE_FREE
    assert len(await home.rows()) == 1
    await home.agree()
