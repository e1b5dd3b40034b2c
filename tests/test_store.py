"""Nothing half-written is ever seen, nothing that is needed is ever removed, nothing temporary stays."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from forge.canonical import Picture
from forge.errors import DiskFull, PictureRefused, StoreFailed
from forge.images import Workshop
from forge.store import MARKER, Store
from pictures import encoded, noise
from volumes import small_volume


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = Store(tmp_path / "store")
    opened.open()
    return opened


def picture(folder: Path, data: bytes = b"a picture") -> Picture:
    """What `Workshop.develop` leaves behind; the store looks at names and bytes only."""
    content_hash = hashlib.sha256(data).hexdigest()
    folder.mkdir(exist_ok=True)
    (folder / "canonical").write_bytes(data)
    return Picture(folder / "canonical", "png", 1, 1, len(data), content_hash, content_hash, "#000000")


def thumbnails(folder: Path) -> dict[int, Path]:
    """What `Workshop.thumbnails` leaves behind."""
    made = {width: folder / f"{width}" for width in (256, 512)}
    for width, path in made.items():
        path.write_bytes(b"thumbnail %d" % width)
    return made


async def kept_with_thumbnails(store: Store, folder: Path, data: bytes = b"a picture") -> Path:
    made = picture(folder, data)
    kept = await store.keep(made)
    assert await store.keep_thumbnails(made.content_hash, made.format, thumbnails(folder))
    return kept


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


def temporary(store: Store) -> list[Path]:
    return list((store.root / "tmp").iterdir())


# Keeping --------------------------------------------------------------------------------------------------


async def test_from_a_stream_to_a_kept_picture_and_nothing_temporary_left(store: Store) -> None:
    data = encoded(noise())
    async with Workshop() as workshop, store.workspace("job-1") as folder:
        size = await store.receive(
            stream(data[:100], data[100:], b"trailing"), folder / "raw", max_bytes=1 << 20
        )
        made = await workshop.develop(folder / "raw", folder)
        kept = await store.keep(made)
        small = await workshop.thumbnails(store.root / kept, folder)
        assert await store.keep_thumbnails(made.content_hash, made.format, small)
    assert size == len(data) + 8
    assert (
        kept == Path("assets") / made.content_hash[:2] / made.content_hash[2:4] / f"{made.content_hash}.png"
    )
    assert (store.root / kept).read_bytes() == data
    assert store.path(made.content_hash, "png") == store.root / kept
    assert all(store.thumbnail_path(made.content_hash, width).stat().st_size for width in (256, 512))
    assert temporary(store) == []
    (found,) = store.files()
    assert (found.content_hash, found.format, found.size_bytes) == (made.content_hash, "png", len(data))


async def test_keeping_twice_keeps_once_and_renews_the_file(store: Store, tmp_path: Path) -> None:
    kept = store.root / await store.keep(picture(tmp_path / "a"))
    os.utime(kept, (1, 1))
    kept.write_bytes(b"dama")
    assert store.root / await store.keep(picture(tmp_path / "b")) == kept
    assert kept.stat().st_mtime > 1
    assert kept.read_bytes() == b"a picture", "what was damaged is whole again"
    assert len(list(store.files())) == 1


async def test_what_is_kept_or_renewed_is_as_new_as_the_clock_says(store: Store, tmp_path: Path) -> None:
    """The kernel's own idea of now is some milliseconds old."""
    for nth in range(20):
        made = picture(tmp_path / f"{nth}", b"picture %d" % nth)
        before = time.time()
        await store.keep(made)
        kept = store.path(made.content_hash, "png")
        assert kept.stat().st_mtime >= before
        before = time.time()
        await store.renew(made.content_hash, "png")
        assert kept.stat().st_mtime >= before


async def test_keeping_the_very_same_developed_picture_again_is_harmless(
    store: Store, tmp_path: Path
) -> None:
    made = picture(tmp_path / "a")
    assert await store.keep(made) == await store.keep(made)
    lost = picture(tmp_path / "b", b"another")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(StoreFailed):
        await store.keep(lost)


async def test_many_keep_the_same_picture_at_once(store: Store, tmp_path: Path) -> None:
    same = [picture(tmp_path / f"{n}") for n in range(30)]
    paths = await asyncio.gather(*(store.keep(made) for made in same))
    assert len(set(paths)) == 1
    assert (store.root / paths[0]).read_bytes() == b"a picture"


async def test_a_picture_that_went_gets_no_thumbnails(store: Store, tmp_path: Path) -> None:
    made = picture(tmp_path / "a")
    await store.keep(made)
    await store.remove(made.content_hash, "png")
    assert not await store.keep_thumbnails(made.content_hash, "png", thumbnails(tmp_path / "a"))
    assert list((store.root / "thumbs").rglob("*.webp")) == []


@pytest.mark.parametrize(
    "bad", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "/..", "a" * 64 + "\n"]
)
async def test_only_a_hash_becomes_part_of_a_path(store: Store, tmp_path: Path, bad: str) -> None:
    with pytest.raises(ValueError, match="is not a hash"):
        store.path(bad, "png")
    with pytest.raises(ValueError, match="is not a hash"):
        store.thumbnail_path(bad, 256)
    with pytest.raises(ValueError, match="is not a hash"):
        await store.remove(bad, "png")
    with pytest.raises(ValueError, match="is not a format"):
        store.path("a" * 64, "../png")


# Removing -------------------------------------------------------------------------------------------------


async def test_removing_takes_the_thumbnails_too_and_says_whether_there_was_something(
    store: Store, tmp_path: Path
) -> None:
    made, other = picture(tmp_path / "a"), picture(tmp_path / "b", b"other")
    await kept_with_thumbnails(store, tmp_path / "a")
    await kept_with_thumbnails(store, tmp_path / "b", b"other")
    assert await store.remove(made.content_hash, "png") is True
    assert await store.remove(made.content_hash, "png") is False
    assert [file.content_hash for file in store.files()] == [other.content_hash]
    assert len(list((store.root / "thumbs").rglob("*.webp"))) == 2
    assert temporary(store) == []


async def test_a_picture_kept_again_after_it_was_chosen_for_removal_stays(
    store: Store, tmp_path: Path
) -> None:
    made = picture(tmp_path / "a")
    final = store.root / await store.keep(made)
    os.utime(final, (1000, 1000))
    await store.keep(picture(tmp_path / "b"))
    assert await store.remove(made.content_hash, "png", untouched_since=2000) is False
    assert final.read_bytes() == b"a picture"
    os.utime(final, (1000, 1000))
    assert await store.remove(made.content_hash, "png", untouched_since=2000) is True
    assert temporary(store) == []


@pytest.mark.fault("G1")
async def test_keeping_wins_every_race_against_a_removal(store: Store, tmp_path: Path) -> None:
    final = store.path(picture(tmp_path / "a").content_hash, "png")
    for n in range(100):
        made = picture(tmp_path / f"{n}")
        await store.keep(made)
        os.utime(final, (1000, 1000))
        again = picture(tmp_path / f"{n}")
        await asyncio.gather(store.keep(again), store.remove(made.content_hash, "png", untouched_since=2000))
        assert final.exists(), f"round {n}"


# A lost mount ---------------------------------------------------------------------------------------------


@pytest.mark.fault("D8")
async def test_without_the_marker_nothing_is_listed_kept_swept_or_removed(
    store: Store, tmp_path: Path
) -> None:
    kept = store.root / await store.keep(picture(tmp_path / "a"))
    assert store.marker_present()
    (store.root / MARKER).unlink()
    assert not store.marker_present()
    with pytest.raises(StoreFailed, match="mounted"):
        list(store.files())
    with pytest.raises(StoreFailed, match="mounted"):
        await store.remove(picture(tmp_path / "b").content_hash, "png")
    with pytest.raises(StoreFailed, match="mounted"):
        await store.keep(picture(tmp_path / "c"))
    with pytest.raises(StoreFailed, match="mounted"):
        store.sweep(0)
    with pytest.raises(StoreFailed, match="mounted"):
        store.open()
    assert kept.exists()


@pytest.mark.fault("D8")
def test_an_empty_folder_is_a_lost_mount_once_there_are_assets(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="mounted"):
        Store(tmp_path).open(create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(StoreFailed):
        Store(tmp_path).open()


def test_a_fresh_volume_and_a_half_founded_store_are_founded(tmp_path: Path) -> None:
    for name in ("lost+found", "assets", "tmp"):
        (tmp_path / name).mkdir()
    Store(tmp_path).open()
    Store(tmp_path).open(create=False)


async def test_many_processes_may_found_it_at_once(tmp_path: Path) -> None:
    await asyncio.gather(*(asyncio.to_thread(Store(tmp_path / "store").open) for _ in range(20)))
    assert Store(tmp_path / "store").marker_present()
    assert temporary(Store(tmp_path / "store")) == []


def test_a_volume_that_refuses_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreFailed):
        Store(tmp_path / "file" / "store").open()


async def test_the_scan_skips_what_forge_did_not_write(store: Store, tmp_path: Path) -> None:
    kept = store.root / await store.keep(picture(tmp_path / "a"))
    kept.with_name("notes.txt").touch()
    kept.with_name("b" * 64 + ".gif").touch()
    assert len(list(store.files())) == 1


# Temporary files ------------------------------------------------------------------------------------------


async def test_a_workspace_is_gone_after_success_and_failure(store: Store) -> None:
    async with store.workspace("job-1") as folder:
        (folder / "deep" / "er").mkdir(parents=True)
    assert temporary(store) == []
    with pytest.raises(OSError, match="the body's own"):
        async with store.workspace("job-1"):
            raise OSError("the body's own")
    assert temporary(store) == []


async def test_a_workspace_is_gone_after_a_cancellation_in_the_middle_of_a_write(store: Store) -> None:
    started = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            started.set()
            yield bytes(1 << 20)

    async def attempt() -> None:
        async with store.workspace("job-1") as folder:
            await store.receive(endless(), folder / "raw", max_bytes=1 << 40)

    for _ in range(5):
        work = asyncio.ensure_future(attempt())
        await started.wait()
        work.cancel()
        await asyncio.sleep(0)
        work.cancel()  # an impatient caller
        with pytest.raises(asyncio.CancelledError):
            await work
        assert temporary(store) == []


async def test_two_attempts_of_one_name_do_not_share_a_folder(store: Store) -> None:
    async with store.workspace("job-1") as zombie:
        async with store.workspace("job-1") as current:
            assert zombie != current
        assert zombie.is_dir()


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "../x", ".hidden", "a\0b", "ü", "x" * 101, "a\n"])
async def test_a_workspace_has_a_plain_name(store: Store, bad: str) -> None:
    with pytest.raises(ValueError, match="cannot name a folder"):
        async with store.workspace(bad):
            pass
    assert temporary(store) == []


async def test_the_sweep_takes_the_dead_and_old_only(store: Store) -> None:
    leftovers = store.root / "tmp" / "job-0.x", store.root / "tmp" / "file"
    leftovers[0].mkdir()
    leftovers[1].touch()
    async with store.workspace("job-1") as alive:
        assert store.sweep(stale_seconds=3600) == 0
        assert store.sweep(stale_seconds=0) == 2
        assert temporary(store) == [alive]


HOLDER = """
import asyncio, sys
from pathlib import Path
from forge.store import Store
async def main():
    async with Store(Path(sys.argv[1])).workspace("job-1") as folder:
        print(folder, flush=True)
        sys.stdin.read()
asyncio.run(main())
"""


def test_what_another_process_uses_is_swept_only_after_its_death(store: Store) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, store.root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        folder = Path(holder.stdout.readline().strip())
        assert store.sweep(0) == 0
        assert folder.is_dir()
        holder.kill()
        holder.wait()
        store.open(stale_seconds=0)
        assert not folder.exists()


# Receiving ------------------------------------------------------------------------------------------------


async def test_more_than_allowed_is_refused_without_reading_on(store: Store) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield bytes(1000)

    async with store.workspace("job-1") as folder:
        with pytest.raises(PictureRefused, match="larger than 10000"):
            await store.receive(endless(), folder / "raw", max_bytes=10_000)
        assert list(folder.iterdir()) == []
        assert await store.receive(stream(bytes(10_000)), folder / "raw", max_bytes=10_000) == 10_000
    assert read == 11


async def test_receiving_takes_bounded_memory(store: Store) -> None:
    async def much() -> AsyncIterator[bytes]:
        for n in range(1024):
            yield bytes([n % 256]) * 65_536

    async with store.workspace("job-1") as folder:
        tracemalloc.start()
        try:
            await store.receive(much(), folder / "raw", max_bytes=1 << 30)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 8 << 20
        expected = hashlib.sha256(b"".join([bytes([n % 256]) * 65_536 for n in range(1024)])).digest()
        assert hashlib.sha256((folder / "raw").read_bytes()).digest() == expected


async def test_an_error_of_the_sender_is_not_taken_for_one_of_the_volume(store: Store) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"some"
        raise ConnectionResetError("the sender's own")

    async with store.workspace("job-1") as folder:
        with pytest.raises(ConnectionResetError):
            await store.receive(broken(), folder / "raw", max_bytes=100)
        assert list(folder.iterdir()) == []


@pytest.fixture
def full_volume(tmp_path: Path) -> Iterator[Path]:
    """A volume of 256 KiB."""
    volume = tmp_path / "small"
    volume.mkdir()
    with small_volume(volume, "256k"):
        yield volume


@pytest.mark.fault("D1")
async def test_a_full_volume_is_said_and_leaves_nothing(full_volume: Path) -> None:
    store = Store(full_volume)
    store.open()
    async with store.workspace("job-1") as folder:
        with pytest.raises(DiskFull, match="No space"):
            await store.receive(stream(*[bytes(65_536)] * 10), folder / "raw", max_bytes=1 << 30)
        assert list(folder.iterdir()) == []
        assert await store.receive(stream(b"small"), folder / "raw", max_bytes=100) == 5


@pytest.mark.fault("D8")
async def test_a_mount_lost_under_a_running_store_loses_nothing(full_volume: Path, tmp_path: Path) -> None:
    mounted, lost = Store(full_volume), Store(tmp_path / "empty")
    mounted.open()
    lost.root.mkdir()
    made = picture(full_volume / "work")
    with pytest.raises(StoreFailed, match="mounted"):
        await lost.keep(made)
    with pytest.raises(StoreFailed):
        async with lost.workspace("job-1"):
            pass
    assert list(lost.root.iterdir()) == []
    assert await mounted.keep(made)


# Crashes --------------------------------------------------------------------------------------------------

KEEPER = """
import asyncio, hashlib, os, sys
from pathlib import Path
from forge.canonical import Picture
from forge.store import Store
async def main():
    store = Store(Path(sys.argv[1]))
    print("go", flush=True)
    while True:
        async with store.workspace("job-1") as folder:
            data = os.urandom(200_000)
            name = hashlib.sha256(data).hexdigest()
            await store.receive(one(data), folder / "canonical", max_bytes=1 << 20)
            await store.keep(Picture(folder / "canonical", "png", 1, 1, len(data), name, name, "#000000"))
            await store.receive(one(b"thumbnail"), folder / "512", max_bytes=100)
            await store.keep_thumbnails(name, "png", {512: folder / "512"})
async def one(data):
    yield data
asyncio.run(main())
"""


SYNCED = """
import asyncio, sys
from pathlib import Path
from forge.images import Workshop
from forge.store import Store
async def main():
    store = Store(Path(sys.argv[1]))
    async with Workshop() as workshop, store.workspace("job-1") as folder:
        kept = await workshop.develop(Path(sys.argv[2]), folder)
        print(store.root / await store.keep(kept))
        small = await workshop.thumbnails(Path(sys.argv[2]), folder)
        await store.keep_thumbnails(kept.content_hash, kept.format, small)
asyncio.run(main())
"""


@pytest.mark.skipif(not shutil.which("strace"), reason="what is synced shows only in the system calls")
@pytest.mark.fault("D4")
def test_what_is_renamed_was_synced_and_its_folder_is_synced_after(store: Store, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(encoded(noise()))
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-y", "-s", "300", "-o", trace, "-e", "trace=fsync,/^rename"]
    done = subprocess.run(
        [*strace, sys.executable, "-c", SYNCED, store.root, tmp_path / "source"],
        capture_output=True,
        text=True,
    )
    if "ptrace" in done.stderr:
        pytest.skip("tracing is not allowed here")
    final = Path(done.stdout.strip())
    calls = trace.read_text().splitlines()
    renames = [n for n, call in enumerate(calls) if "rename" in call and final.stem in call]
    assert len(renames) == 3
    assert str(final) in calls[renames[0]], "the picture comes first"
    for rename in renames:
        source, _ = re.findall(r'"(/[^"]+)"', calls[rename])
        assert any(f"<{source}>" in call for call in calls[:rename] if "fsync" in call)
    # a thumbnail that is lost can be made again
    for folder in list(final.parents)[:3]:
        assert any(f"<{folder}>" in call for call in calls[renames[0] : renames[1]] if "fsync" in call), (
            folder
        )


@pytest.mark.fault("D4")
def test_a_kill_at_any_moment_leaves_whole_files_and_nothing_that_is_not_swept(store: Store) -> None:
    for kept in (1, 4, 9):
        with subprocess.Popen([sys.executable, "-c", KEEPER, store.root], stdout=subprocess.PIPE) as keeper:
            assert keeper.stdout
            keeper.stdout.readline()
            while len(list(store.files())) < kept:
                pass
            keeper.send_signal(signal.SIGKILL)
        store.sweep(0)
        assert temporary(store) == []
        for file in store.files():
            path = store.path(file.content_hash, file.format)
            assert hashlib.sha256(path.read_bytes()).hexdigest() == file.content_hash
            small = store.thumbnail_path(file.content_hash, 512)
            assert not small.exists() or small.read_bytes() == b"thumbnail"


# Uploads --------------------------------------------------------------------------------------------------


async def test_an_upload_and_an_asset_of_one_content_are_two_files(store: Store, tmp_path: Path) -> None:
    asset = await kept_with_thumbnails(store, tmp_path / "a")
    sent = picture(tmp_path / "b")
    upload = await store.keep(sent, "uploads")
    digest = sent.content_hash
    assert upload == Path("uploads") / digest[:2] / digest[2:4] / f"{digest}.png"
    assert asset == Path("assets", *upload.parts[1:])
    assert [file.content_hash for file in store.files("uploads")] == [digest]

    assert await store.remove(digest, "png", "uploads")
    assert not (store.root / upload).exists()
    assert (store.root / asset).exists()
    assert all(store.thumbnail_path(digest, width).exists() for width in (256, 512))


async def test_an_upload_that_was_kept_again_is_not_removed(store: Store, tmp_path: Path) -> None:
    sent = picture(tmp_path / "a")
    await store.keep(sent, "uploads")
    assert not await store.remove(sent.content_hash, "png", "uploads", untouched_since=1.0)
    assert len(list(store.files("uploads"))) == 1


async def test_a_volume_of_an_older_forge_gets_its_folder(store: Store, tmp_path: Path) -> None:
    (store.root / "uploads").rmdir()
    Store(store.root).open(create=False)
    await store.keep(picture(tmp_path / "a"), "uploads")
    assert len(list(store.files("uploads"))) == 1


async def test_a_volume_from_a_backup_gets_what_can_be_made_again(store: Store, tmp_path: Path) -> None:
    for folder in ("tmp", "thumbs"):
        (store.root / folder).rmdir()
    Store(store.root).open(create=False)
    await store.keep(picture(tmp_path / "a"))
    assert len(list(store.files())) == 1


async def test_uploads_without_a_marker_are_a_lost_mount_too(store: Store, tmp_path: Path) -> None:
    await store.keep(picture(tmp_path / "a"), "uploads")
    (store.root / MARKER).unlink()
    with pytest.raises(StoreFailed, match="mounted"):
        Store(store.root).open()
