"""What a log costs for each job in it, and so for a million: ``python -m benchmarks.book [--jobs N]``.

The events of jobs of all fates (:mod:`benchmarks.story`) are written into the log, in four equal steps. After
each of them nats-server is started again, and everything is looked at: its files, its memory and how long it
took; how long an API takes until it has read the log, and what it then holds; the same for one that begins
with the snapshot which the first has left; the second copy in Postgres, and how long ``forge log verify``
takes. A line through the steps (Theil–Sen) gives the cost of a job, and what a million would cost by it: that
is an extrapolation, and says so.

The window of duplicates is closed before nats-server is started again: in a benchmark the jobs of years
arrive within its ten minutes.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import psutil
from rich.table import Table

from benchmarks import harness, servers, story
from benchmarks.harness import Figure
from benchmarks.trend import theil_sen
from forge import bootstrap, database, guard
from forge.broker import connect, request
from forge.embedded import EmbeddedNats, EmbeddedPostgres
from forge.events.jobs import JobSubmitted
from forge.eventstore import EventStore
from forge.settings import load
from forge.store import Store
from forge.workers import archivist

STEPS = 4
MILLION = 1_000_000
_CLOSED = int(100e6)
_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 600.0


class Cost(msgspec.Struct, frozen=True):
    """A log of so many jobs. Seconds of CPU stand beside seconds, since other work falls on those."""

    jobs: int
    events: int
    nats_bytes: float
    nats_rss: float
    nats_start: float
    api_start: float
    api_cpu: float
    api_rss: float
    api_again: float
    api_again_cpu: float
    copy_bytes: float
    verify: float
    verify_cpu: float


ABOUT = {
    "nats_bytes": ("nats-server, disk", "kB", 1e3, "GB", 1e9),
    "nats_rss": ("nats-server, RSS after its start", "kB", 1e3, "GB", 1e9),
    "nats_start": ("nats-server, start", "µs", 1e-6, "s", 1.0),
    "api_start": ("API, start until it has read the log", "µs", 1e-6, "s", 1.0),
    "api_cpu": ("of it, CPU of the API", "µs", 1e-6, "s", 1.0),
    "api_rss": ("API, RSS then", "kB", 1e3, "GB", 1e9),
    "api_again": ("API, start with a snapshot", "µs", 1e-6, "s", 1.0),
    "api_again_cpu": ("of it, CPU of the API", "µs", 1e-6, "s", 1.0),
    "copy_bytes": ("second copy, in Postgres", "kB", 1e3, "GB", 1e9),
    "verify": ("forge log verify", "µs", 1e-6, "s", 1.0),
    "verify_cpu": ("of it, CPU of the command", "µs", 1e-6, "s", 1.0),
}
"""What of a cost is shown: its name, its unit for one job and for a million, each with its size."""


class Bench:
    """The servers of one run."""

    def __init__(self, root: Path) -> None:
        self.nats = EmbeddedNats(root / "nats", anybody=True)
        self.postgres = EmbeddedPostgres(root / "postgres")
        self.root = root
        self.place = servers.Place(root, {}, {})

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            self.place.environ.update(
                {
                    **os.environ,
                    "FORGE_NATS_URL": self.nats.start(),
                    "FORGE_NATS_PASSWORDS_DIR": str(self.nats.passwords_dir),
                    "FORGE_POSTGRES_DSN": self.postgres.start(),
                    "FORGE_DATA_DIR": str(self.root / "data"),
                    "FORGE_LOG_LEVEL": "WARNING",
                    "FORGE_HOST": "127.0.0.1",
                }
            )
            settings = load(self.place.environ)
            asyncio.run(bootstrap.setup(settings))
            Store(settings.assets_dir).open()
            yield
        finally:
            self.postgres.stop()
            self.nats.stop()

    def grow(self, before: int, events: int) -> None:
        asyncio.run(self._grow(before, events))

    async def _grow(self, before: int, events: int) -> None:
        nc = await connect(self.nats.url, "bench")
        await story.write(nc, events, after=before)
        async with database.opened(self.postgres.dsn(), most=2) as pool:
            copying = asyncio.create_task(archivist.run(nc, pool))
            while (await pool.fetchval("select max(seq) from forge_log.entry") or 0) < events:
                if copying.done():
                    copying.result()
                await asyncio.sleep(_LOOK_SECONDS)
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)
        config = msgspec.json.decode(await request(nc, "STREAM.INFO.FORGE_EVENTS"))["config"]
        await request(nc, "STREAM.UPDATE.FORGE_EVENTS", {**config, "duplicate_window": _CLOSED})
        await nc.close()

    def cost(self, jobs: int, events: int) -> Cost:
        self.nats.stop()
        began = time.perf_counter()
        self.nats.start(_PATIENCE_SECONDS)
        asyncio.run(self._has(events))
        started = time.perf_counter() - began
        assert self.nats.process is not None
        rss = psutil.Process(self.nats.process.pid).memory_info().rss
        asyncio.run(self._postgres("delete from forge_log.snapshot"))
        api, again = self._api(), self._api()
        verify, verify_cpu = self._verify()
        return Cost(
            jobs=jobs,
            events=events,
            nats_bytes=_size(self.root / "nats" / "jetstream"),
            nats_rss=rss,
            nats_start=started,
            api_start=api[0],
            api_cpu=api[1],
            api_rss=api[2],
            api_again=again[0],
            api_again_cpu=again[1],
            copy_bytes=asyncio.run(self._postgres("select pg_total_relation_size('forge_log.entry')")),
            verify=verify,
            verify_cpu=verify_cpu,
        )

    async def _has(self, events: int) -> None:
        """Serving means that its streams are there."""
        nc = await connect(self.nats.url, "bench")
        there = (await guard.extent(EventStore(nc))).last
        await nc.close()
        if there != events:
            raise SystemExit(f"nats-server came back with {there} of {events} events")

    def _api(self) -> tuple[float, float, float]:
        """Seconds until it has read the log, of CPU, and bytes then; it leaves a snapshot."""
        port, began = servers.free_port(), time.perf_counter()
        words = ["forge", "api", "--open-to-loopback"]
        with servers.process(
            "api", words, self.place, FORGE_PORT=str(port), FORGE_SNAPSHOT_EVENTS="1"
        ) as child:
            while not _caught_up(f"http://127.0.0.1:{port}/readyz"):
                if not child.running or time.perf_counter() - began > _PATIENCE_SECONDS:
                    raise SystemExit(f"the API does not start:\n{child.last_words()}")
                time.sleep(_LOOK_SECONDS)
            took, process = time.perf_counter() - began, psutil.Process(child.pid)
            found = took, harness.cpu_seconds(child.pid), process.memory_info().rss
            while not asyncio.run(self._postgres("select count(*) from forge_log.snapshot")):
                time.sleep(_LOOK_SECONDS)
            return found

    def _verify(self) -> tuple[float, float]:
        before, began = _children(), time.perf_counter()
        words = [sys.executable, "-m", "forge", "log", "verify"]
        subprocess.run(words, check=True, env=self.place.environ, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began, _children() - before

    async def _postgres(self, statement: str) -> int:
        connection = await asyncpg.connect(self.postgres.dsn())
        try:
            return int(await connection.fetchval(statement) or 0)
        finally:
            await connection.close()


def _caught_up(url: str) -> bool:
    """Whatever else it lacks, here for want of a ComfyUI or a projector."""
    try:
        with urllib.request.urlopen(url, timeout=5.0) as answer:
            told = answer.read()
    except urllib.error.HTTPError as error:
        told = error.read()
    except OSError:
        return False
    return bool(msgspec.json.decode(told)["checks"]["caught_up"]["ok"])


def _children() -> float:
    own = psutil.Process().cpu_times()
    return own.children_user + own.children_system


def _size(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def events_of(jobs: int) -> int:
    """How many events there are before the submission of the job after so many."""
    submitted = 0
    for nth, (event, _) in enumerate(story.events()):
        submitted += isinstance(event, JobSubmitted)
        if submitted > jobs:
            return nth
    raise AssertionError  # pragma: no cover  # the story has no end


def main() -> None:
    given = harness.command(
        __doc__.splitlines()[0] if __doc__ else "",
        1,
        0,
        ("--jobs", {"type": int, "default": 40_000, "help": "jobs in the end [%(default)s]"}),
    )
    steps = 2 if given.short else STEPS
    if given.short:
        given.jobs = 200
    parent = given.dir or Path("/var/tmp")
    where, found = harness.environment(parent), []
    with tempfile.TemporaryDirectory(prefix="forge-bench-", dir=parent) as name:
        bench, before = Bench(Path(name)), 0
        bench.root.chmod(0o755)
        with bench.running():
            for step in range(1, steps + 1):
                jobs = given.jobs * step // steps
                events = events_of(jobs)
                bench.grow(before, events)
                found.append(bench.cost(jobs, events))
                before = events
    how = f"{found[-1].events / found[-1].jobs:.1f} events a job; one run"
    harness.show("book", where, how, [_table(found), _slopes(found)])
    harness.write(given.json, "book", where, jobs=given.jobs, costs=found, figures=_figures(found))


def slope(found: list[Cost], what: str) -> float:
    """What one job more costs."""
    return theil_sen([cost.jobs for cost in found], [getattr(cost, what) for cost in found])


def _table(found: list[Cost]) -> Table:
    table = Table(title="a log of so many jobs")
    table.add_column("")
    for cost in found:
        table.add_column(f"{cost.jobs}", justify="right")
    for what, (name, *_) in ABOUT.items():
        size, unit = (1e6, "MB") if ABOUT[what][1] == "kB" else (1.0, "s")
        table.add_row(name, *(f"{getattr(cost, what) / size:.2f} {unit}" for cost in found))
    return table


def _slopes(found: list[Cost]) -> Table:
    table = Table(title="by a line through them")
    for column in ("", "a job", "a million jobs, extrapolated"):
        table.add_column(column, justify="right" if column else "left")
    for what, (name, unit, size, whole, whole_size) in ABOUT.items():
        each = slope(found, what)
        table.add_row(name, f"{each / size:.2f} {unit}", f"{each * MILLION / whole_size:.2f} {whole}")
    return table


def _figures(found: list[Cost]) -> list[Figure]:
    beside = f"from {found[0].jobs} to {found[-1].jobs} jobs"
    figures: list[Any] = []
    for what, (name, unit, size, whole, whole_size) in ABOUT.items():
        each = slope(found, what)
        reached = f"{each / size:.2f} {unit} a job; a million: {each * MILLION / whole_size:.2f} {whole}"
        figures.append(Figure(what=name, reached=reached, beside=beside))
    return figures


if __name__ == "__main__":
    main()
