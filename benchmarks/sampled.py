"""What a running forge holds at one moment: on disk, in tables, in memory, in the log. It only reads."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import asyncpg
import msgspec
import nats
import psutil

from benchmarks.harness import PATIENCE_SECONDS
from benchmarks.servers import Place

MARKER = ".forge-store"

_COUNTS = """
select (select count(*) from asset_inventory) as assets,
       (select count(*) from asset_reference) as referred,
       (select count(*) from asset_reference where expires_at < now() - interval '10 seconds') as overdue,
       (select count(*) from generation_queue where status = 'completed') as completed,
       (select count(*) from generation_queue where status in ('pending', 'running')) as under_way,
       (select count(*) from generation_queue) as jobs,
       pg_database_size(current_database()) as database_bytes
"""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Counts and bytes after so many ``done`` jobs, ``at`` so many seconds; memory and descriptors are of a
    process and its children. ``unlinks_due`` are events that the cleanup role has not handled yet."""

    done: int
    at: float
    pictures: int
    files: int
    file_bytes: int
    at_comfyui: int
    rss: dict[str, int]
    descriptors: dict[str, int]
    unlinks_due: int
    log_messages: int
    log_bytes: int
    log_disk_bytes: int
    assets: int
    referred: int
    overdue: int
    completed: int
    under_way: int
    jobs: int
    database_bytes: int

    @property
    def left(self) -> dict[str, int]:
        """What should be 0 when every asset's time is over."""
        return {
            "files": self.files,
            "assets": self.assets,
            "references": self.referred,
            "files at ComfyUI": self.at_comfyui,
        }


class Sampler:
    """Takes samples of everything that was started in a place."""

    def __init__(self, at: Place) -> None:
        self._at = at
        self._began = time.monotonic()

    async def __aenter__(self) -> Sampler:
        self._nc = await nats.connect(self._at.environ["FORGE_NATS_URL"])
        self._postgres = await asyncpg.connect(self._at.environ["FORGE_POSTGRES_DSN"])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._postgres.close()
        await self._nc.close()

    async def take(self, done: int) -> Sample:
        at = time.monotonic() - self._began
        root = self._at.root
        volume = root / "data" / "assets"
        kept = await asyncio.to_thread(_files, volume)
        drawn = [
            await asyncio.to_thread(_files, root / "comfyui" / kind / "forge") for kind in ("output", "input")
        ]
        jetstream = self._nc.jetstream(timeout=PATIENCE_SECONDS)
        state = (await jetstream.stream_info("FORGE_EVENTS")).state
        cleanup = await jetstream.consumer_info("FORGE_EVENTS", "cleanup")
        [log] = root.glob("nats/jetstream/*/streams/FORGE_EVENTS/msgs")
        pids = {name: _family(pid) for name, pid in self._at.pids.items()}
        return Sample(
            done=done,
            at=at,
            pictures=sum(path.is_relative_to(volume / "assets") for path in kept),
            files=len(kept),
            file_bytes=sum(kept.values()),
            at_comfyui=sum(map(len, drawn)),
            rss={name: sum(map(_rss, family)) for name, family in pids.items()},
            descriptors={name: sum(map(_descriptors, family)) for name, family in pids.items()},
            unlinks_due=(cleanup.num_pending or 0) + (cleanup.num_ack_pending or 0),
            log_messages=state.messages,
            log_bytes=state.bytes,
            log_disk_bytes=sum((await asyncio.to_thread(_files, log)).values()),
            **dict(await self._postgres.fetchrow(_COUNTS) or {}),
        )


def _files(folder: Path) -> dict[Path, int]:
    """Every file below a folder with its bytes, but for the marker of the volume."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place, name)
            try:
                found[path] = path.lstat().st_size
            except FileNotFoundError:
                continue  # it went meanwhile
    return {path: size for path, size in found.items() if path.name != MARKER}


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _descriptors(process: psutil.Process) -> int:
    try:
        return int(process.num_fds())
    except psutil.NoSuchProcess:
        return 0
