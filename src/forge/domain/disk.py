"""When a volume is nearly full, too full, or full: lines that are crossed, with room between up and down.

The three levels lie inside each other: a volume that is full is also over its clean-up line and over its
warning. How many of them hold is the *rank*, 0 to 3, so the newest crossing in the log says all there is to
know. A level that was crossed is left only some way below its line; otherwise a volume that stands on the
line would say so at every look.
"""

from __future__ import annotations

import msgspec

from forge.events.system import DiskCrossed, Level

LEVELS: tuple[Level, ...] = ("warn", "clean", "full")
WARN, CLEAN, FULL = 1, 2, 3
"""Ranks, in words."""

MARGIN = 0.02
"""A line of use is left this part of the volume below it."""

RESERVE_BYTES = 64 * 1024**2
RESERVE_RATIO = 0.05
"""What is kept free unless the settings say otherwise: so much, and never more than this part of a volume."""

LEAVE_FULL = 1.5
"""A full volume is full until so many reserves are free."""


class Disk(msgspec.Struct, frozen=True):
    """A volume in bytes. ``limit`` is its size, or what the settings say it is; ``free`` is what can still be
    written, which is less than ``limit - used`` where others use the same volume."""

    used: int
    limit: int
    free: int

    @property
    def ratio(self) -> float:
        return self.used / self.limit if self.limit else 1.0


class Lines(msgspec.Struct, frozen=True):
    """Parts of the volume in use that raise a warning and start a clean-up; bytes that are kept free."""

    warn: float
    clean: float
    reserve: int | None = None

    def reserved(self, disk: Disk) -> int:
        """Bytes below which this volume is full."""
        if self.reserve is not None:
            return self.reserve
        return min(RESERVE_BYTES, int(disk.limit * RESERVE_RATIO))


def full(disk: Disk, lines: Lines, was: bool = False) -> bool:
    """Whether no work may be taken; ``was`` says that it was so at the last look."""
    return disk.free < lines.reserved(disk) * (LEAVE_FULL if was else 1)


def rank(disk: Disk, lines: Lines, before: int = 0) -> int:
    """How many levels hold now, where ``before`` of them held at the last look."""
    reached = _rank(disk, lines, 0.0, False)
    held = _rank(disk, lines, MARGIN, True)
    return reached if reached > before else min(before, held)


def _rank(disk: Disk, lines: Lines, margin: float, was: bool) -> int:
    if full(disk, lines, was):
        return FULL
    if disk.ratio >= lines.clean - margin:
        return CLEAN
    return WARN if disk.ratio >= lines.warn - margin else 0


def rank_after(newest: DiskCrossed | None) -> int:
    """The rank that the newest crossing in the log left."""
    if newest is None:
        return 0
    return LEVELS.index(newest.level) + (1 if newest.above else 0)


def crossings(disk: Disk, before: int, now: int) -> list[DiskCrossed]:
    """The events of going from one rank to another, in order: one for each line; none when it is the same."""
    if now > before:
        return [_crossed(disk, nth, True) for nth in range(before, now)]
    return [_crossed(disk, nth, False) for nth in reversed(range(now, before))]


def reminder(disk: Disk, now: int) -> list[DiskCrossed]:
    """The highest line said once more, for a clean-up that could not make enough room; none below it."""
    return [_crossed(disk, now - 1, True)] if now >= CLEAN else []


def _crossed(disk: Disk, nth: int, above: bool) -> DiskCrossed:
    return DiskCrossed(level=LEVELS[nth], above=above, used_bytes=disk.used, limit_bytes=disk.limit)
