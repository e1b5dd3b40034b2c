"""What a process knows of its volume and memory, and what it refuses because of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from forge import resources
from forge.errors import DiskFull, Overloaded, StoreFailed
from forge.resources import Capacity, Volume, _container
from forge.settings import Settings
from volumes import small_volume
from waiting import wait_until

KIB = 1024
MIB = 1024 * KIB


class Clock:
    """Time as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks waits until the volume has answered, however busy the machine is."""
    monkeypatch.setattr(resources, "_LOOK_SECONDS", 60.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def file(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


def settings(folder: Path, **more: object) -> Settings:
    (folder / "assets").mkdir(exist_ok=True)
    roomy = Settings(data_dir=folder, disk_limit_bytes=1000 * KIB, memory_limit_bytes=64 * 1024**3)
    return msgspec.structs.replace(roomy, **more)


# ----------------------------------------------------------------------- disk


async def test_of_a_real_volume_everything_counts(tmp_path: Path) -> None:
    def same() -> bool:
        seen, real = Volume(tmp_path).measure(), psutil.disk_usage(str(tmp_path))
        wanted = (real.used, real.used + real.free, real.free)
        return (seen.used, seen.limit, seen.free) == pytest.approx(wanted, rel=0.05)

    await wait_until(same, what="one look in which nobody wrote much meanwhile")


def test_of_a_volume_with_a_limit_our_finished_files_count(tmp_path: Path) -> None:
    file(tmp_path / "assets/ab/cd/picture.png", 300)
    file(tmp_path / "thumbs/ab/cd/picture.256.webp", 20)
    file(tmp_path / "tmp/attempt/half", 5000)
    volume = Volume(tmp_path, 1000)
    assert volume.kinds() == {"assets": 300, "thumbs": 20, "tmp": 5000}
    seen = volume.measure()
    assert (seen.used, seen.limit, seen.free) == (320, 1000, 680)
    volume.took(600)
    assert volume.measure().free == 80, "what was just made counts before it is counted"


def test_counting_many_files_is_not_done_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([100.0, 103.0, 104.0, 162.9, 163.0, 163.1])
    monkeypatch.setattr(resources, "time", SimpleNamespace(monotonic=lambda: next(times)))
    volume = Volume(tmp_path, 1000)
    volume.measure()
    file(tmp_path / "assets/picture", 300)
    assert volume.measure().used == 0
    assert volume.measure().used == 0
    assert volume.measure().used == 300, "it took 3 s, so it was done again after a minute"


async def test_a_full_volume_takes_nothing_until_there_is_room_again(tmp_path: Path, clock: Clock) -> None:
    capacity = Capacity(settings(tmp_path), clock)
    await capacity.room()
    large = file(tmp_path / "assets/assets/large", 960 * KIB)
    await capacity.room()  # known for a second
    clock.now += 1.1
    capacity.volume._walk_again_at = 0
    with pytest.raises(DiskFull, match=str(960 * KIB)):
        await capacity.room()
    assert capacity.full
    file(large, 940 * KIB)
    clock.now += 1.1
    capacity.volume._walk_again_at = 0
    with pytest.raises(DiskFull):
        await capacity.room()
    file(large, 920 * KIB)
    clock.now += 1.1
    capacity.volume._walk_again_at = 0
    await capacity.room()
    assert not capacity.full


async def test_a_file_may_use_the_reserve_but_not_the_limit(tmp_path: Path, clock: Clock) -> None:
    file(tmp_path / "assets/assets/large", 990 * KIB)
    capacity = Capacity(settings(tmp_path), clock)
    await capacity.room_for(10 * KIB)
    capacity.took(5 * KIB)
    clock.now += 1.1
    with pytest.raises(DiskFull):
        await capacity.room_for(10 * KIB)
    await Capacity(settings(tmp_path, disk_limit_bytes=None), clock).room_for(
        1 << 60
    )  # a real volume says it


async def test_a_refused_write_closes_for_a_moment_and_longer_the_next_time(
    tmp_path: Path, clock: Clock
) -> None:
    capacity = Capacity(settings(tmp_path), clock)
    for pause in (2.0, 4.0, 8.0, 10.0, 10.0):
        capacity.refused()
        clock.now += pause - 0.01
        with pytest.raises(DiskFull):
            await capacity.room()
        clock.now += 0.02
        await capacity.room()
    capacity.took(1)
    capacity.refused()
    clock.now += 2.1
    await capacity.room()


async def test_a_volume_that_is_not_there_is_said(tmp_path: Path, clock: Clock) -> None:
    capacity = Capacity(settings(tmp_path), clock)
    await capacity.room()
    capacity.volume.root = tmp_path / "gone"
    capacity.volume._walk_again_at = 0
    clock.now += 1.1
    with pytest.raises(StoreFailed, match="gone"):
        await capacity.room()


async def test_a_volume_that_hangs_is_believed_for_a_minute(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    capacity = Capacity(settings(tmp_path), clock)
    await capacity.room()
    monkeypatch.setattr(resources, "_LOOK_SECONDS", 0.02)
    reader, writer = os.pipe()  # a read that never ends, as of a dead network volume
    monkeypatch.setattr(capacity.volume, "measure", lambda: os.read(reader, 1))
    clock.now += 59.0
    await capacity.room()
    clock.now += 2.0
    with pytest.raises(StoreFailed, match="does not answer"):
        await capacity.room()
    hanging = capacity._looking
    with pytest.raises(StoreFailed):
        await capacity.room()
    assert capacity._looking is hanging, "one thread hangs, not one for each request"
    os.close(writer)
    await asyncio.gather(hanging, return_exceptions=True)  # type: ignore[arg-type]
    os.close(reader)


# --------------------------------------------------------------------- memory


@pytest.fixture
def ballast() -> Iterator[list[bytes]]:
    """Memory that a test holds and lets go."""
    held: list[bytes] = []
    yield held
    held.clear()


async def test_short_memory_refuses_work_and_comes_back(
    tmp_path: Path, clock: Clock, ballast: list[bytes]
) -> None:
    resources._trim()  # what earlier tests let go should not be taken for what this one does
    now = psutil.Process().memory_info().rss
    capacity = Capacity(settings(tmp_path, memory_limit_bytes=round((now + 60 * MIB) / 0.9)), clock)
    capacity.spare()
    ballast.append(os.urandom(100 * MIB))
    capacity.spare()  # known for half a second
    clock.now += 0.6
    with pytest.raises(Overloaded, match="process"):
        capacity.spare()
    ballast.clear()
    clock.now += 0.6
    capacity.spare()


async def test_memory_that_was_let_go_is_given_back_to_the_machine(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[float] = []
    monkeypatch.setattr(resources, "_trim", lambda: trimmed.append(clock.now))
    capacity = Capacity(settings(tmp_path, memory_limit_bytes=1), clock)
    for _ in range(20):
        clock.now += 0.6
        with pytest.raises(Overloaded):
            capacity.spare()
    assert len(trimmed) == 3, "at once, and every five seconds"


def test_a_control_group_with_a_limit_is_a_bound(tmp_path: Path) -> None:
    group, mine = tmp_path / "cgroup", tmp_path / "self"
    mine.write_text("4:memory:/old\n0::/pods/forge\n")
    assert _container(group, mine) is None
    folder = group / "pods/forge"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("max\n")
    assert _container(group, mine) is None
    (folder / "memory.max").write_text("1000\n")
    (folder / "memory.current").write_text("900\n")
    (folder / "memory.stat").write_text("anon 500\ninactive_file 350\n")
    bound = _container(group, mine)
    assert bound is not None
    assert (bound.name, bound.used, bound.limit) == ("container", 550, 1000)
    mine.write_text("4:memory:/old\n")
    assert _container(group, mine) is None


# -------------------------------------------------------------------- waiting


async def test_who_waits_for_room_goes_on_when_there_is_some(tmp_path: Path) -> None:
    large = file(tmp_path / "assets/assets/large", 1000 * KIB)
    capacity = Capacity(settings(tmp_path))
    waiting = asyncio.create_task(capacity.opened())
    await wait_until(lambda: capacity.full, what="it was seen to be full")
    assert not waiting.done()
    large.unlink()
    await asyncio.wait_for(waiting, 30)


async def test_who_waits_for_room_ends_when_told_to_stop(tmp_path: Path) -> None:
    file(tmp_path / "assets/assets/large", 1000 * KIB)
    stop = asyncio.Event()
    waiting = asyncio.create_task(Capacity(settings(tmp_path)).opened(stop))
    stop.set()
    await asyncio.wait_for(waiting, 30)


async def test_a_really_full_volume_is_full(tmp_path: Path) -> None:
    (tmp_path / "assets").mkdir()
    with small_volume(tmp_path / "assets", "1m") as volume:
        capacity = Capacity(settings(tmp_path, disk_limit_bytes=None))
        await capacity.room()
        file(volume / "large", 1000 * KIB)
        await wait_until(lambda: _refuses(capacity), what="it is full")
        capacity = Capacity(settings(tmp_path, disk_limit_bytes=1 << 40))
        with pytest.raises(DiskFull):  # whatever the settings say
            await capacity.room()
    with small_volume(tmp_path / "assets", "1m,nr_inodes=20") as volume:
        for nth in range(30):
            try:
                file(volume / f"{nth}", 0)
            except OSError:
                break
        with pytest.raises(DiskFull):
            await Capacity(settings(tmp_path, disk_limit_bytes=None)).room()


async def _refuses(capacity: Capacity) -> bool:
    try:
        await capacity.room()
    except DiskFull:
        return True
    return False
