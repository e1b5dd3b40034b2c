"""Uploads that nobody uses go, with their files; no other file ever does."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

from factories import upload_stored
from forge import database
from forge.canonical import Picture
from forge.database import Pool
from forge.domain.uploads import FEW_STRAYS, Upload
from forge.errors import UploadGone
from forge.eventstore import EventStore
from forge.retention import Retention
from forge.settings import Settings
from forge.store import Store
from forge.topology import CLEANUP, EVENTS
from forge.uploads import Uploads
from forge.workers import projector
from forge.workers.cleanup import Cleanup
from forge.workers.uploads import expire_due, remove_strays, unlink
from waiting import wait_until


@pytest.fixture
async def pool(database_dsn: str) -> AsyncIterator[Pool]:
    async with database.opened(database_dsn) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = Store(tmp_path / "store")
    opened.open()
    return opened


@pytest.fixture
def uploads(events: EventStore) -> Uploads:
    return Uploads(events)


@pytest.fixture
async def projecting(nats_client: Client, pool: Pool) -> AsyncIterator[None]:
    task = asyncio.create_task(projector.run(nats_client, pool))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def soon(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def kept(store: Store, data: bytes = b"a picture") -> str:
    """A picture on the volume; its hash."""
    digest = hashlib.sha256(data).hexdigest()
    async with store.workspace("upload") as folder:
        (folder / "png").write_bytes(data)
        made = Picture(folder / "png", "png", 1, 1, len(data), digest, digest, "#000000")
        await store.keep(made, "uploads")
    return digest


async def sent(uploads: Uploads, store: Store, user: str = "mei", life: float = 1000, **more: Any) -> Upload:
    now, digest = datetime.now(UTC), await kept(store, **more)
    given = {"created_at": now, "expires_at": now + timedelta(seconds=life), "ttl_seconds": round(life)}
    upload, _, _ = await uploads.keep(upload_stored(user, digest, **given), actor=user)
    return upload


def file(store: Store, upload: Upload) -> Path:
    return store.path(upload.content_hash, "png", "uploads")


async def rows(pool: Pool) -> int:
    count: int = await pool.fetchval("select count(*) from upload")
    return count


async def in_table(pool: Pool, count: int) -> None:
    await wait_until(lambda: _is(pool, count), what=f"the table has {count} uploads")


async def _is(pool: Pool, count: int) -> bool:
    return await rows(pool) == count


# -------------------------------------------------------------------- expiring


@pytest.mark.usefixtures("projecting")
async def test_what_is_due_expires_and_nothing_else(pool: Pool, uploads: Uploads, store: Store) -> None:
    old = await sent(uploads, store, life=100)
    young = await sent(uploads, store, "lan", life=5000)
    await in_table(pool, 2)
    assert await expire_due(pool, uploads, soon(50)) == 0
    assert await expire_due(pool, uploads, soon(101)) == 1
    with pytest.raises(UploadGone):
        await uploads.find("mei", old.id)
    assert await uploads.find("lan", young.id) == young
    await in_table(pool, 1)
    assert await expire_due(pool, uploads, soon(101)) == 0


async def test_a_table_that_is_behind_ends_nothing_that_was_just_used(
    pool: Pool, uploads: Uploads, store: Store, nats_client: Client
) -> None:
    upload = await sent(uploads, store, life=100)
    following = asyncio.create_task(projector.run(nats_client, pool))
    await in_table(pool, 1)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)

    again = upload_stored("mei", upload.content_hash, created_at=soon(90), ttl_seconds=100)
    await uploads.keep(again, actor="mei")  # the table does not hear of it
    assert await expire_due(pool, uploads, soon(101)) == 0
    assert (await uploads.find("mei", upload.id)).expires_at > soon(150)


async def test_use_and_expiry_at_once_never_both_win(uploads: Uploads, store: Store) -> None:
    """Whoever is written first decides: used, it lives on; expired, it cannot be used."""
    for number in range(10):
        upload = await sent(uploads, store, life=100, data=b"%d" % number)
        again = upload_stored("mei", upload.content_hash, created_at=soon(101), expires_at=soon(201))
        ended, (_, _, new) = await asyncio.gather(
            uploads.expire("mei", upload.id, soon(101), actor="scheduler"), uploads.keep(again, actor="mei")
        )
        assert ended == new, "it is new again exactly when it had ended before"
        assert (await uploads.find("mei", upload.id)).expires_at > soon(150)


# ------------------------------------------------------------------- unlinking


async def expired(uploads: Uploads, events: EventStore, upload: Upload) -> Any:
    """End an upload; the event that says so."""
    assert await uploads.expire(upload.user_id, upload.id, soon(10**6), actor="scheduler")
    return await events.at(await events.head())


async def test_a_file_goes_with_the_last_upload_of_its_content(
    uploads: Uploads, events: EventStore, store: Store
) -> None:
    mine, theirs = await sent(uploads, store), await sent(uploads, store, "lan")
    assert not await unlink(await expired(uploads, events, mine), uploads, store)
    assert file(store, mine).exists()
    record = await expired(uploads, events, theirs)
    assert await unlink(record, uploads, store)
    assert not file(store, mine).exists()
    assert not await unlink(record, uploads, store), "said twice, done once"


async def test_a_picture_sent_again_during_the_grace_keeps_its_file(
    uploads: Uploads, events: EventStore, store: Store
) -> None:
    record = await expired(uploads, events, upload := await sent(uploads, store))
    await sent(uploads, store)
    assert not await unlink(record, uploads, store)
    assert file(store, upload).exists()


async def test_a_file_that_is_just_being_kept_is_left_though_the_log_does_not_know_yet(
    uploads: Uploads, events: EventStore, store: Store
) -> None:
    record = await expired(uploads, events, upload := await sent(uploads, store))
    await kept(store)
    assert not await unlink(record, uploads, store)
    assert file(store, upload).exists()


async def test_an_asset_of_the_same_content_is_another_file(
    uploads: Uploads, events: EventStore, store: Store
) -> None:
    upload = await sent(uploads, store)
    asset = store.path(upload.content_hash, "png")
    asset.parent.mkdir(parents=True)
    asset.write_bytes(b"a picture")
    assert await unlink(await expired(uploads, events, upload), uploads, store)
    assert asset.exists()
    assert [found.content_hash for found in store.files()] == [upload.content_hash]


@pytest.mark.usefixtures("projecting")
async def test_the_cleanup_role_hears_of_expired_uploads(
    nats_client: Client, pool: Pool, uploads: Uploads, events: EventStore, store: Store, settings: Settings
) -> None:
    upload = await sent(uploads, store)
    stop = asyncio.Event()
    role = asyncio.create_task(Cleanup(Retention(events, pool, store, settings), 0.1).run(stop))
    await expired(uploads, events, upload)
    await wait_until(lambda: not file(store, upload).exists(), what="the file goes")
    stop.set()
    await role
    info = await nats_client.jetstream().consumer_info(EVENTS, CLEANUP)
    assert info.num_ack_pending == info.num_pending == 0


# ---------------------------------------------------------------------- strays


def aged(store: Store, digest: str, seconds: float = 1000) -> Path:
    path = store.path(digest, "png", "uploads")
    then = datetime.now(UTC).timestamp() - seconds
    os.utime(path, (then, then))
    return path


@pytest.mark.usefixtures("projecting")
async def test_a_file_whose_api_died_before_it_told_the_log_goes(
    pool: Pool, uploads: Uploads, store: Store
) -> None:
    upload = await sent(uploads, store)
    mine, stray, fresh = (
        aged(store, upload.content_hash),
        aged(store, await kept(store, b"stray")),
        aged(store, await kept(store, b"fresh"), 100),
    )
    await in_table(pool, 1)
    assert await remove_strays(pool, uploads, store, datetime.now(UTC), stale_seconds=500) == 1
    assert [path.exists() for path in (mine, stray, fresh)] == [True, False, True]


async def test_an_empty_table_removes_nothing(pool: Pool, uploads: Uploads, store: Store) -> None:
    """Nobody projects: only the log knows of the upload."""
    path = aged(store, (await sent(uploads, store)).content_hash)
    assert await rows(pool) == 0
    assert await remove_strays(pool, uploads, store, datetime.now(UTC), stale_seconds=500) == 0
    assert path.exists()


async def test_a_lost_log_removes_nothing(pool: Pool, uploads: Uploads, store: Store) -> None:
    paths = [aged(store, await kept(store, b"%d" % n)) for n in range(FEW_STRAYS + 1)]
    assert await remove_strays(pool, uploads, store, datetime.now(UTC), stale_seconds=500) == 0
    assert all(path.exists() for path in paths)
