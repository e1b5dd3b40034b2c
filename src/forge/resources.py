"""What forge uses and whether it may take more: room on the asset volume, memory of process and machine.

:class:`Volume` measures, :class:`Capacity` is what a process asks before it takes work. Both answer from what
they saw a moment ago, so asking costs next to nothing.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from forge.domain import memory
from forge.domain.disk import Disk, Lines, full
from forge.domain.memory import Bound
from forge.errors import DiskFull, Overloaded, StoreFailed
from forge.settings import Settings

log = logging.getLogger("forge.resources")

DISK_SECONDS = 1.0
MEMORY_SECONDS = 0.5
"""How old an answer may be."""

_LOOK_SECONDS = 0.5
_STALE_SECONDS = 60.0
"""A volume that does not answer is believed to be as it was for so long."""

_WALK_SHARE = 20
"""Counting our own files takes at most this part of the time."""

_POLL_SECONDS = 0.25
_TRIM_SECONDS = 5.0
_REFUSED_SECONDS = 2.0
_REFUSED_SECONDS_MOST = 10.0

_TEMPORARY = "tmp"


class Volume:
    """The volume that holds ``root``. With a limit of its own, forge's finished files count against that, and
    what others keep there does not; the real room still does."""

    def __init__(self, root: Path, limit_bytes: int | None = None) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._kinds: dict[str, int] = {}
        self._walk_again_at = 0.0
        self._taken = 0

    def measure(self, anew: bool = False) -> Disk:
        """Use, size and room; blocking. ``anew`` counts our own files whatever it takes.

        Raises:
            OSError: the volume is not there.
        """
        volume = os.statvfs(self.root)
        free = volume.f_bavail * volume.f_frsize
        if volume.f_files and not volume.f_favail:
            free = 0  # no file can be made any more, whatever its size
        if self.limit_bytes is None:
            used = (volume.f_blocks - volume.f_bfree) * volume.f_frsize
            return Disk(used, used + volume.f_bavail * volume.f_frsize, free)
        used = sum(size for kind, size in self.kinds(anew).items() if kind != _TEMPORARY) + self._taken
        return Disk(used, self.limit_bytes, max(0, min(self.limit_bytes - used, free)))

    def kinds(self, anew: bool = False) -> dict[str, int]:
        """Folder at the top of the volume → bytes of the files below it; blocking.

        Files are counted again after a second, or later where there are so many that counting takes long.
        """
        began = time.monotonic()
        if anew or began >= self._walk_again_at:
            self._taken = 0
            with os.scandir(self.root) as entries:
                self._kinds = {
                    e.name: _bytes_below(e.path) for e in entries if e.is_dir(follow_symlinks=False)
                }
            ended = time.monotonic()
            self._walk_again_at = ended + max(DISK_SECONDS, _WALK_SHARE * (ended - began))
        return self._kinds

    def took(self, size: int) -> None:
        """Count a file that was just made, until all are counted anew."""
        self._taken += size


class Capacity:
    """What a process checks before it takes work."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.lines = Lines(settings.disk_warn_ratio, settings.disk_clean_ratio, settings.disk_reserve_bytes)
        self.volume = Volume(settings.assets_dir, settings.disk_limit_bytes)
        self._memory_limit, self._shed = settings.memory_limit_bytes, settings.memory_shed_ratio
        self._clock = clock
        self._seen: Disk | None = None
        self._seen_at = self._bounds_at = self._trimmed_at = -_STALE_SECONDS
        self._wrong = ""
        self._looking: asyncio.Task[None] | None = None
        self._bounds: tuple[Bound, ...] = ()
        self._pause = _REFUSED_SECONDS
        self._refused_until = 0.0
        self.full = self.short = False

    # ------------------------------------------------------------------ disk

    async def disk(self) -> Disk:
        """The asset volume as it was at most a second ago.

        Raises:
            StoreFailed: it is not there, or has not answered for a minute.
        """
        if self._clock() - self._seen_at > DISK_SECONDS:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.create_task(self._look(), name="look at the volume")
            await asyncio.wait([self._looking], timeout=_LOOK_SECONDS)
        if self._wrong:
            raise StoreFailed(self._wrong)
        if self._seen is None or self._clock() - self._seen_at > _STALE_SECONDS:
            raise StoreFailed("the asset volume does not answer")
        return self._seen

    async def measured(self) -> Disk:
        """The asset volume as it is now, for who cannot do with what was.

        Raises:
            StoreFailed: it is not there.
        """
        try:
            return await asyncio.to_thread(self.volume.measure, True)
        except OSError as error:
            raise StoreFailed(f"{self.volume.root}: {error.strerror or error}") from error

    async def room(self) -> None:
        """Go on only if there is room for new work.

        Raises:
            DiskFull: there is not.
            StoreFailed: nobody knows.
        """
        disk = await self.disk()
        if self.full or self._clock() < self._refused_until:
            raise _full(disk)

    async def room_for(self, size: int) -> None:
        """Go on only if a finished file of ``size`` bytes may stay; the reserve is there for that.

        Raises:
            DiskFull: it may not. A real volume says so itself, while it is written.
            StoreFailed: nobody knows.
        """
        if self.volume.limit_bytes is not None and (disk := await self.disk()).free < size:
            raise _full(disk)

    def took(self, size: int) -> None:
        """Count a file that this process has just kept."""
        self._pause = _REFUSED_SECONDS
        self.volume.took(size)

    def refused(self) -> None:
        """The volume has refused a write, whatever it says of its room: leave it alone for a moment."""
        self._refused_until = self._clock() + self._pause
        self._pause = min(self._pause * 2, _REFUSED_SECONDS_MOST)

    async def _look(self) -> None:
        try:
            seen = await asyncio.to_thread(self.volume.measure)
        except OSError as error:
            self._wrong = f"{self.volume.root}: {error.strerror or error}"
            self._seen_at = self._clock()
            return
        self._seen, self._seen_at, self._wrong = seen, self._clock(), ""
        is_full = full(seen, self.lines, was=self.full)
        if is_full != self.full:
            said = "the asset volume is full" if is_full else "the asset volume has room again"
            log.warning(said, extra={"used": seen.used, "limit": seen.limit, "free": seen.free})
        self.full = is_full

    # ---------------------------------------------------------------- memory

    def memory(self) -> tuple[Bound, ...]:
        """Memory in use as it was at most half a second ago."""
        now = self._clock()
        if now - self._bounds_at > MEMORY_SECONDS:
            self._bounds, self._bounds_at = _bounds(self._memory_limit), now
            self._judge(now)
        return self._bounds

    def spare(self) -> None:
        """Go on only if there is memory for new work.

        Raises:
            Overloaded: there is not.
        """
        bounds = self.memory()
        if self.short:
            bound = memory.tightest(bounds)
            raise Overloaded(f"memory is short: the {bound.name} uses {bound.used} of {bound.limit} bytes")

    def _judge(self, now: float) -> None:
        is_short = memory.short(self._bounds, self._shed, was=self.short)
        if is_short and now - self._trimmed_at > _TRIM_SECONDS:
            self._trimmed_at = now
            _trim()
            self._bounds = _bounds(self._memory_limit)
            is_short = memory.short(self._bounds, self._shed, was=self.short)
        if is_short != self.short:
            said = "memory is short, work is refused" if is_short else "memory is enough again"
            log.warning(said, extra={"memory": {b.name: [b.used, b.limit] for b in self._bounds}})
        self.short = is_short

    # --------------------------------------------------------------- waiting

    async def opened(self, stop: asyncio.Event | None = None) -> None:
        """Wait until there are room and memory for new work, or ``stop`` is set."""
        while stop is None or not stop.is_set():
            with suppress(DiskFull, StoreFailed, Overloaded):
                self.spare()
                await self.room()
                return
            await asyncio.sleep(_POLL_SECONDS)


def _full(disk: Disk) -> DiskFull:
    return DiskFull(f"{disk.used} of {disk.limit} bytes are in use, {disk.free} are free")


def memory_bytes() -> int:
    """Resident memory of this process and its children."""
    process = psutil.Process()
    total: int = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _bytes_below(folder: str) -> int:
    total, folders = 0, [folder]
    while folders:
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    with suppress(FileNotFoundError):
                        total += entry.stat(follow_symlinks=False).st_size
    return total


def _bounds(limit: int) -> tuple[Bound, ...]:
    machine = psutil.virtual_memory()
    found = [
        Bound("process", psutil.Process().memory_info().rss, limit),
        memory.machine(machine.total, machine.available),
    ]
    container = _container()
    return (*found, container) if container else tuple(found)


def _container(root: Path = Path("/sys/fs/cgroup"), of: Path = Path("/proc/self/cgroup")) -> Bound | None:
    """The memory of this process's control group (version 2), where it has a limit.

    What the group has read from files and not used lately does not count: the kernel drops it when it must.
    """
    try:
        line = next(line for line in of.read_text().splitlines() if line.startswith("0::"))
        group = root / line[3:].strip("/")
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((group / "memory.current").read_text())
        stat = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
        return Bound("container", max(0, used - int(stat.get("inactive_file", 0))), int(limit))
    except (OSError, ValueError, StopIteration):
        return None


def _trim() -> None:
    """Give memory that is not used any more back to the machine; without it a peak would last for ever."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library than glibc keeps it
        ctypes.CDLL(None).malloc_trim(0)
