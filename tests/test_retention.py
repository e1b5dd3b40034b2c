"""What goes and what stays, on a real log, tables and volume."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from nats.aio.client import Client

from factories import deleted, meta, pinned, unpinned
from forge.domain.retention import BRAKE_FREE, DAMAGED, EVICTED, EXPIRED, LOST, OLD, ORPHANED, TEMPORARY
from forge.errors import NotFound, NothingDeletedNow, Pinned, StoreMissing
from forge.events.assets import AssetDamaged, AssetDeleted, AssetExpired, AssetLost, AssetPinned, AssetStored
from forge.events.cleanup import CleanupFinished, CleanupHeld
from forge.eventstore import Draft
from forge.library import Library
from forge.plans import Wish
from forge.settings import Settings
from forge.store import MARKER
from forge.topology import session, subject
from keeping import House, ago, house


@pytest.fixture
async def home(nats_client: Client, settings: Settings) -> AsyncIterator[House]:
    async with house(nats_client, settings) as home:
        yield home


def pin_of(asset: AssetStored, make: Any = pinned) -> Any:
    return make(asset.job_id, asset.user_id, asset.content_hash, character_id=asset.character_id)


async def many(home: House, count: int, **fields: Any) -> list[AssetStored]:
    hashes = [await home.file(b"picture %d" % number) for number in range(count)]
    return await home.refer(hashes, len(b"picture 0"), **fields)


# ------------------------------------------------------------------- expiry


async def test_what_is_due_expires_and_nothing_else(home: House) -> None:
    due = await home.asset(b"due", expires=ago(1), character_id="c", session_id="s")
    later = await home.asset(b"later", expires=ago(-1))
    kept = await home.asset(b"kept", expires=ago(1))
    await Library(home.events).pin(pin_of(kept), actor="mei")
    await home.projected()
    went = await home.retention().sweep(EXPIRED, actor="scheduler")
    assert went[EXPIRED].assets == 1
    [gone] = await home.facts(AssetExpired)
    assert (gone.asset_id, gone.reason, gone.file_size_bytes) == (due.asset_id, "expired", 3)
    assert await home.rows() == {later.content_hash, kept.content_hash}
    assert home.files() == {a.content_hash for a in (due, later, kept)}, "files follow, after their grace"


async def test_a_reference_expires_and_a_longer_one_keeps_the_row(home: House) -> None:
    first = await home.asset(b"same", expires=ago(1))
    [second] = await home.refer([first.content_hash], 4, expires=(until := ago(-9)), user="lan")
    await home.retention().sweep(EXPIRED, actor="scheduler")
    await home.projected()
    assert [row["job_id"] for row in await home.pool.fetch("select * from asset_reference")] == [
        second.job_id
    ]
    assert await home.pool.fetchval("select expires_at from asset_inventory") == until


async def test_schedulers_at_once_expire_each_reference_once(home: House) -> None:
    await many(home, 8, expires=ago(1))
    await asyncio.gather(*(home.retention().sweep(EXPIRED, actor=f"scheduler {n}") for n in range(4)))
    assert len(await home.facts(AssetExpired)) == 8
    assert await home.rows() == set()


async def test_use_extends_a_life_only_when_it_is_set_so(home: House) -> None:
    await home.asset(b"used", expires=ago(1))
    await home.pool.execute("update asset_inventory set last_accessed_at = $1", ago(0.5))
    wish = Wish(reasons=(EXPIRED,))
    assert (await home.retention(asset_use_extends_seconds=3600).planner.plan(wish)).assets == 0
    assert (await home.retention(asset_use_extends_seconds=1200).planner.plan(wish)).assets == 1
    assert (await home.retention().planner.plan(wish)).assets == 1


@pytest.mark.parametrize("days", [-8, 8])
@pytest.mark.fault("T1")
async def test_a_wrong_clock_deletes_nothing(home: House, days: int) -> None:
    await home.asset(b"due", expires=ago(1))
    await home.asset(b"in seven days", expires=ago(-7 * 24))
    await home.file(b"orphan", 9 * 24)

    def clock() -> datetime:
        return datetime.now(UTC) + timedelta(days=days)

    for reason in (EXPIRED, ORPHANED, EVICTED):
        with pytest.raises(NothingDeletedNow, match="clock"):
            await home.retention(clock, disk_limit_bytes=1).sweep(reason, actor="scheduler")
    assert len(await home.rows()) == 2
    assert len(home.files()) == 3


async def test_tables_that_are_behind_delete_nothing(home: House) -> None:
    await home.asset(b"due", expires=ago(1))
    retention = home.retention()
    async with home.pool.acquire() as connection, connection.transaction():
        # the projector cannot move while this is held
        await connection.execute("select * from projection_checkpoint for update")
        gone = deleted()
        await home.events.append([Draft(gone, meta("x"), subject(gone), 0)])
        with pytest.raises(NothingDeletedNow, match="the tables are at"):
            await retention.planner.projected(patience=0.3)


# --------------------------------------------------------------------- pins


async def test_a_pin_wins_over_expiry_and_eviction_and_not_over_deletion(home: House) -> None:
    library, asset = Library(home.events), await home.asset(b"dear", expires=ago(1))
    await library.pin(pin_of(asset), actor="mei")
    gone = deleted(asset.job_id, asset.user_id, asset.content_hash)
    with pytest.raises(Pinned):
        await library.give_up(gone, actor="scheduler", unless_pinned=True)
    await library.pin(pin_of(asset, unpinned), actor="mei")
    await library.pin(pin_of(asset), actor="mei")
    assert await home.pool.fetchval("select pinned from asset_inventory") in (True, False)
    await library.give_up(gone, actor="mei")
    assert await home.rows() == set()
    with pytest.raises(NotFound):
        await library.pin(pin_of(asset), actor="mei")


async def test_pinning_twice_is_pinning_once(home: House) -> None:
    library, asset = Library(home.events), await home.asset(b"dear")
    seqs = await asyncio.gather(*(library.pin(pin_of(asset), actor="mei") for _ in range(5)))
    assert len(set(seqs)) == 1
    assert len(await home.facts(AssetPinned)) == 1


@pytest.mark.parametrize("owned", [{}, {"character_id": "c", "session_id": "s"}], ids=str)
async def test_of_a_pin_and_an_expiry_at_once_one_wins(home: House, owned: dict[str, str]) -> None:
    """Whoever is told `pinned` keeps the asset; whoever is told `gone` never sees it pinned."""
    library, outcomes = Library(home.events), set()
    for number in range(60):
        if number >= 12 and len(outcomes) == 2:
            break
        asset = await home.asset(b"contended %d" % number, **owned)
        gone = deleted(
            asset.job_id,
            asset.user_id,
            asset.content_hash,
            **owned,
        )
        start = asyncio.Barrier(2)

        async def at_once(act: Any, start: asyncio.Barrier = start) -> str:
            await start.wait()
            try:
                await act
            except (Pinned, NotFound) as error:
                return error.code
            return "done"

        pin = library.pin(pin_of(asset), actor="mei")
        expire = library.give_up(gone, actor="scheduler", unless_pinned=True)
        pin, expire = _later(home, pin, number % 7), _later(home, expire, max(0, 2 - number))
        answers = await asyncio.gather(at_once(pin), at_once(expire))
        assert tuple(answers) in {("done", "pinned"), ("not_found", "done")}
        outcomes.add(tuple(answers))
        there = asset.content_hash in await home.rows()
        assert there is (answers[0] == "done")
    assert len(outcomes) == 2, "one of the two never won: this test says nothing"


async def _later(home: House, act: Any, trips: int) -> Any:
    """Begun so many round trips to the log later."""
    for _ in range(trips):
        await home.events.head()
    return await act


# ----------------------------------------------------------------- eviction


async def test_room_is_made_by_what_is_worth_least_down_to_the_target(home: House) -> None:
    assets = await many(home, 10)
    size = assets[0].file_size_bytes
    for nth, asset in enumerate(assets):
        await home.pool.execute(
            "update asset_inventory set last_accessed_at = $1 where id = $2", ago(nth), asset.asset_id
        )
    await Library(home.events).pin(pin_of(assets[9]), actor="mei")
    await home.projected()
    retention = home.retention(disk_limit_bytes=10 * size, disk_warn_ratio=0.8)
    went = await retention.make_room(await home.events.head(), 10 * size, 10 * size, actor="cleanup")
    assert went[EVICTED].assets == 2
    gone = await home.facts(AssetDeleted)
    assert [g.asset_id for g in gone] == [assets[8].asset_id, assets[7].asset_id]
    assert {g.reason for g in gone} == {"evicted"}


async def test_a_crossing_handled_twice_evicts_once(home: House) -> None:
    assets = await many(home, 10)
    size = assets[0].file_size_bytes
    crossed = await home.events.head()
    # the real volume: what was given up still lies there until its grace is over
    retention = home.retention()
    volume = {"used": 10 * size, "limit": 10 * size}

    async def too_many(_: int) -> int:
        return 2 * size

    retention.planner._too_many_bytes = too_many  # type: ignore[method-assign]
    for _ in range(3):
        await retention.make_room(crossed, *volume.values(), actor="cleanup")
    assert len(await home.facts(AssetDeleted)) == 2


async def test_an_eviction_stops_at_the_brake_and_says_so(home: House) -> None:
    await many(home, BRAKE_FREE + 10)
    retention = home.retention(disk_limit_bytes=10)
    went = await retention.make_room(await home.events.head(), 10_000, 10, actor="cleanup")
    assert went[EVICTED].assets == BRAKE_FREE
    [held] = await home.facts(CleanupHeld)
    assert (held.assets, held.of) == (BRAKE_FREE + 10, BRAKE_FREE + 10)


# ------------------------------------------------------------------ orphans


async def test_a_file_without_a_row_goes_when_it_is_old(home: House) -> None:
    kept = await home.asset(b"kept")
    old, young = await home.file(b"old"), await home.file(b"young", 0)
    went = await home.retention().sweep(ORPHANED, actor="scheduler")
    assert (went[ORPHANED].assets, went[ORPHANED].bytes) == (1, 3)
    assert home.files() == {kept.content_hash, young}
    assert not home.store.thumbnail_path(old, 256).exists()
    [done] = await home.facts(CleanupFinished)
    assert done.assets == {"orphaned": 1}


async def test_a_file_that_is_touched_meanwhile_stays(home: House) -> None:
    await home.asset(b"kept")
    orphan = await home.file(b"again")
    retention = home.retention()
    plan = await retention.planner.plan(Wish(reasons=(ORPHANED,)))
    assert [file.content_hash for file in plan.orphans] == [orphan]
    assert await home.store.renew(orphan, "png")
    assert await retention.carry_out(plan, actor="scheduler") == {}
    assert orphan in home.files()


async def test_a_file_whose_asset_went_a_moment_ago_is_the_cleanup_roles(home: House) -> None:
    await home.asset(b"kept")
    asset = await home.asset(b"gone")
    await Library(home.events).give_up(deleted(asset.job_id, asset.user_id, asset.content_hash), actor="mei")
    wish = Wish(reasons=(ORPHANED,))
    assert (await home.retention().planner.plan(wish)).orphans == []
    [orphan] = (await home.retention(orphan_grace_seconds=0.0).planner.plan(wish)).orphans
    assert orphan.content_hash == asset.content_hash


@pytest.mark.fault("D9")
async def test_an_empty_table_deletes_nothing(home: House) -> None:
    await home.file(b"orphan")
    assert await home.retention().sweep(ORPHANED, actor="scheduler") == {}
    assert len(home.files()) == 1


async def test_a_table_that_lacks_rows_deletes_nothing(home: House) -> None:
    """Half of the rows are gone although the checkpoint says that all is there."""
    assets = await many(home, 6)
    await home.pool.execute(
        "delete from asset_inventory where id = any($1::uuid[])", [asset.asset_id for asset in assets[:3]]
    )
    assert await home.retention().sweep(ORPHANED, actor="scheduler") == {}
    assert len(home.files()) == 6


@pytest.mark.fault("D8")
async def test_a_lost_mount_deletes_nothing(home: House) -> None:
    await many(home, 3)
    (home.store.root / MARKER).unlink()
    shutil.rmtree(home.store.root / "assets")
    for reason in (LOST, ORPHANED, TEMPORARY):
        with pytest.raises(StoreMissing):
            await home.retention().sweep(reason, actor="scheduler")
    assert len(await home.rows()) == 3
    assert await home.facts(AssetLost) == []


@pytest.mark.fault("D6")
async def test_a_row_without_its_file_is_said_and_given_up(home: House) -> None:
    lost = await home.asset(b"lost", session_id="s", session_bytes=4)
    kept = await home.asset(b"kept")
    dear = await home.asset(b"dear")
    await Library(home.events).pin(pin_of(dear), actor="mei")
    for asset in (lost, dear):
        home.path(asset.content_hash).unlink()
    await home.projected()
    for _ in range(2):
        await home.retention().sweep(LOST, actor="scheduler")
        await home.projected()
    told = await home.facts(AssetLost)
    assert sorted(t.asset_id for t in told) == sorted([lost.asset_id, dear.asset_id])
    [gone] = await home.facts(AssetDeleted)
    assert (gone.asset_id, gone.reason) == (lost.asset_id, "lost")
    assert await home.rows() == {kept.content_hash, dear.content_hash}, "what is pinned waits for its file"
    assert (await home.events.last(session("s"))) is not None


@pytest.mark.parametrize("harm", ["shorter", "flipped", "link"])
@pytest.mark.fault("D6")
async def test_a_damaged_file_is_found_said_and_given_up(
    home: House, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    asset = await home.asset(b"a picture of a crane")
    path = home.path(asset.content_hash)
    if harm == "shorter":
        path.write_bytes(b"a picture")
    elif harm == "flipped":
        path.write_bytes(b"a picture of a CRANE")
    else:
        path.rename(path.with_suffix(".elsewhere"))
        path.symlink_to(path.with_suffix(".elsewhere"))
    retention = home.retention()
    if harm == "flipped":
        assert await retention.sweep(LOST, DAMAGED, actor="scheduler") == {}, "only reading it all tells"
        await retention.scrub(actor="scheduler")
    went = await retention.sweep(LOST, DAMAGED, actor="scheduler")
    assert list(went) == [DAMAGED]
    assert len(await home.facts(AssetDamaged)) == 1
    assert await home.rows() == set()
    [line] = [r for r in caplog.records if r.getMessage() == "an asset's file is not there as stored"]
    assert (line.__dict__["asset"], line.__dict__["content_hash"]) == (
        str(asset.asset_id),
        asset.content_hash,
    )


async def test_the_scrub_goes_round_in_steps(home: House) -> None:
    assets = sorted(await many(home, 5), key=lambda asset: asset.content_hash)
    home.path(assets[4].content_hash).write_bytes(b"PICTURE 0")
    retention = home.retention(scrub_bytes=18)
    for _ in range(2):
        assert await retention.scrub(actor="scheduler") == 18
        assert await home.facts(AssetDamaged) == []
    await retention.scrub(actor="scheduler")
    assert [told.asset_id for told in await home.facts(AssetDamaged)] == [assets[4].asset_id]
    assert retention._scrubbed == ""


async def test_thumbnails_of_nobody_and_empty_folders_go(home: House) -> None:
    kept, gone = await home.asset(b"kept"), await home.file(b"gone")
    home.path(gone).unlink()
    thumbnail = home.store.thumbnail_path(gone, 256)
    assert home.store.tidy(ago(1).timestamp(), pretend=True) == 1
    # three folders are young: they changed just now
    assert home.store.tidy(ago(1).timestamp()) == 1
    assert not thumbnail.exists()
    assert home.store.tidy(ago(-1).timestamp()) == 4
    assert not thumbnail.parent.exists()
    assert home.store.thumbnail_path(kept.content_hash, 256).exists()


# -------------------------------------------------------------------- brake


async def test_much_at_once_waits_for_an_operator(home: House) -> None:
    await many(home, BRAKE_FREE + 1, expires=ago(1))
    retention = home.retention()
    for _ in range(2):
        assert await retention.sweep(EXPIRED, actor="scheduler") == {}
    assert await home.facts(AssetExpired) == []
    [held] = await home.facts(CleanupHeld)
    assert (held.reasons, held.assets, held.of) == (["expired"], BRAKE_FREE + 1, BRAKE_FREE + 1)
    plan = await retention.planner.plan(Wish(reasons=(EXPIRED,)))
    went = await retention.carry_out(plan, actor="operator")
    assert went[EXPIRED].assets == BRAKE_FREE + 1


async def test_rows_that_lost_their_files_at_once_wait_for_an_operator(home: House) -> None:
    await many(home, BRAKE_FREE + 1)
    shutil.rmtree(home.store.root / "assets")
    (home.store.root / "assets").mkdir()
    assert await home.retention().sweep(LOST, actor="scheduler") == {}
    assert len(await home.rows()) == BRAKE_FREE + 1
    assert len(await home.facts(AssetLost)) == BRAKE_FREE + 1


async def test_only_what_is_in_the_plan_goes(home: House) -> None:
    planned = await home.asset(b"planned", expires=ago(1))
    plan = await home.retention().planner.plan(Wish(reasons=(EXPIRED,)))
    later = await home.asset(b"later", expires=ago(1))
    await home.retention().carry_out(plan, actor="operator")
    assert await home.rows() == {later.content_hash}
    assert [gone.asset_id for gone in await home.facts(AssetExpired)] == [planned.asset_id]


async def test_a_wish_names_owner_type_and_age(home: House) -> None:
    mine = await home.asset(b"mine", user="mei", asset_type="ui_icon", created_at=ago(5))
    await home.asset(b"young", user="mei", asset_type="ui_icon", created_at=ago(1))
    await home.asset(b"another type", user="mei", created_at=ago(5))
    await home.asset(b"another's", user="lan", asset_type="ui_icon", created_at=ago(5))
    wish = Wish(reasons=(OLD,), owner="mei", asset_type="ui_icon", before=ago(3))
    plan = await home.retention().planner.plan(wish)
    assert [asset for asset, _ in plan.claims] == [mine.asset_id]
    assert (plan.by_type()["ui_icon"].bytes, plan.by_reason()[OLD].assets) == (4, 1)
