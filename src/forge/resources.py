"""What forge uses: disk of the asset volume, memory of the process, as samples for the metrics stream."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import psutil


class Disk(msgspec.Struct, frozen=True):
    """The asset volume in bytes; ``limit`` is the real volume, or what the settings say it is."""

    used: int
    limit: int

    @property
    def ratio(self) -> float:
        return self.used / self.limit if self.limit else 0.0


def disk(root: Path, limit_bytes: int | None, assets_bytes: int) -> Disk:
    """The volume that holds ``root``; with a limit of its own, only forge's assets count against it.

    Raises:
        OSError: the volume is not there.
    """
    if limit_bytes is not None:
        return Disk(assets_bytes, limit_bytes)
    volume = psutil.disk_usage(os.fspath(root))
    return Disk(volume.used, volume.used + volume.free)


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
