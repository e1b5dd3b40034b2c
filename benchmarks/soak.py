"""A day of forge in some minutes: ``python -m benchmarks.soak``. Does the disk plateau, is memory flat?

12 960 jobs are what three places draw in a day at twenty seconds a picture. Here ComfyUI takes no time, and
what forge does by the clock is as much faster: an asset lives for a twelfth of the run, and in that time the
scheduler looks as often as in two hours. The graces are seconds, because what they protect, a conclusion,
takes no less time than on any other day.

A job is a flat picture of its own, without session and character. Samples are taken while so many jobs are in
flight; the first third at least is warm-up. Then everything has to go: every asset's time ends.

Ends with 1 when a job was lost, something was left behind, the disk did not plateau, or memory or descriptors
surely grow by more than they may. ``--short`` only proves that all this works: it judges no growth.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import aiohttp
import msgspec
from rich.table import Table

from benchmarks import harness, servers
from benchmarks.asked import EVENTS, SUBMIT, swatch, user
from benchmarks.load_forge import Endings
from benchmarks.remembered import explained
from benchmarks.sampled import Sample, Sampler
from benchmarks.trend import Trend, Verdict, trend, verdict
from benchmarks.wire import Connection, connect, post

DAY = 12_960
SHORT = 80
SAMPLES = 120

LEAK_BYTES = 512
"""A process may grow by so much a job (RELIABILITY), beyond what it remembers on purpose."""

DISK_SHARE = 0.05
"""Of what a job stores, so much may stay: the plateau is as steady as the rate of the jobs, and not more."""

DESCRIPTORS = 0.001
"""A job: a dozen in a day."""

GRACE_SECONDS = 2.0
ORPHAN_GRACE_SECONDS = 20.0
PATIENCE_SECONDS = 120.0


class Found(msgspec.Struct, kw_only=True):
    """What the run showed."""

    jobs: int
    ttl: int
    seconds: float = 0.0
    refused: int = 0
    sockets_lost: int = 0
    operator: int = 0
    samples: list[Sample] = []
    end: Sample | None = None
    explained: dict[str, float] = {}


class _Message(msgspec.Struct):
    t: str
    seq: int = 0
    type: str = ""
    key: str = ""


class _Accepted(msgspec.Struct):
    id: str


_OVER = ("job.completed", "job.failed", "job.cancelled")
_message = msgspec.json.Decoder(_Message)
_accepted = msgspec.json.Decoder(_Accepted)


def main() -> None:
    given = _command()
    with servers.place(given.dir) as place:
        place.environ.update(_compressed(given.ttl, place.root))
        with (
            servers.simulator(place) as comfyui,
            servers.forge_worker(place, comfyui),
            servers.forge_api(place) as forge,
        ):
            where = harness.environment(place.root)
            found = asyncio.run(_soak(given, place, forge))
    assert found.end is not None
    figures = _figures(found, found.end)
    how = (
        f"{found.jobs} jobs, {given.in_flight} in flight, {found.seconds:.0f} s; "
        f"an asset lives {found.ttl} s; "
        f"{len(_plateau(found))} of {len(found.samples)} samples are behind the warm-up"
    )
    harness.show("soak", where, how, [_table(figures), _beside(found, found.end)])
    harness.write(given.json, "soak", where, found=found, figures=[figure.told() for figure in figures])
    bad = [figure.what for figure in figures if figure.fails and (not given.short or figure.exact)]
    sys.exit(f"not as wanted: {', '.join(bad)}" if bad else 0)


def _command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true", help="some seconds, to see that it works")
    parser.add_argument("--jobs", type=int, default=DAY, help="[%(default)s, a day]")
    parser.add_argument("--in-flight", type=int, default=12, help="jobs under way at once [%(default)s]")
    parser.add_argument("--ttl", type=int, help="seconds an asset lives [a twelfth of the run at 25 jobs/s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample and figure here")
    parser.add_argument("--dir", type=Path, help="where the servers keep their files [/var/tmp]")
    given = parser.parse_args()
    if given.short:
        given.jobs = SHORT
    given.ttl = given.ttl or max(2, given.jobs // (25 * 12))
    return given


def _compressed(ttl: int, root: Path) -> dict[str, str]:
    return {
        "FORGE_ASSET_TTL_SECONDS": str(ttl),
        "FORGE_SCAN_SECONDS": str(max(0.2, ttl / 120)),
        "FORGE_CLEANUP_GRACE_SECONDS": str(GRACE_SECONDS),
        "FORGE_ORPHAN_GRACE_SECONDS": str(ORPHAN_GRACE_SECONDS),
        "FORGE_COMFYUI_DIRS": str(root / "comfyui"),
        "FORGE_RATE_PER_HOUR": "0",
    }


# --------------------------------------------------------------------- the run


async def _soak(given: argparse.Namespace, place: servers.Place, forge: str) -> Found:
    found = Found(jobs=given.jobs, ttl=given.ttl)
    async with Sampler(place) as sampler:
        began = time.monotonic()
        await Load(forge, given.jobs, given.in_flight, sampler, found).run()
        found.seconds = time.monotonic() - began
        found.end = await _emptied(sampler, place, found)
    after = _plateau(found)[0].done if _plateau(found) else 0
    if not given.short:
        found.explained = await explained(place.environ["FORGE_NATS_URL"], after)
    return found


class Load:
    """So many jobs in flight until all are over, with a sample now and then."""

    def __init__(self, url: str, jobs: int, in_flight: int, sampler: Sampler, found: Found) -> None:
        self.url, self.jobs, self.in_flight = url, jobs, min(in_flight, jobs)
        self.sampler, self.found = sampler, found
        self.endings = Endings()
        self.first, self.numbers, self.done = secrets.randbelow(1 << 24), itertools.count(), 0
        self.listening = asyncio.Event()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(self._listen())
            group.create_task(self._sample())
            await self.listening.wait()
            async with asyncio.TaskGroup() as clients:
                for client in range(self.in_flight):
                    clients.create_task(self._client(client))
            listening.cancel()

    async def _listen(self) -> None:
        """Hear how jobs end; a socket that was lost goes on where it was."""
        after: int | None = None
        async with aiohttp.ClientSession() as session:
            while True:
                where = self.url + EVENTS + (f"?after={after}" if after else "")
                async with session.ws_connect(where) as socket:
                    async for heard in socket:
                        message = _message.decode(heard.data)
                        after = max(after or 0, message.seq)
                        if message.t == "mark":
                            self.listening.set()
                        if message.type in _OVER:
                            self.endings.tell(message.key, message.type)
                self.found.sockets_lost += 1

    async def _sample(self) -> None:
        every, due = max(1, self.jobs // SAMPLES), 0
        while self.done < self.jobs:  # and not until cancelled: a wait for nats-py may lose that
            if self.done >= due:
                self.found.samples.append(await self.sampler.take(self.done))
                due = self.done - self.done % every + every
            await asyncio.sleep(0.05)

    async def _client(self, client: int) -> None:
        connection = await connect(self.url)
        for nth in itertools.count():
            number = next(self.numbers)
            if number >= self.jobs:
                break
            job_id = await self._asked(connection, client, nth, number)
            ending = self.endings.of(job_id)
            await asyncio.wait({ending}, timeout=PATIENCE_SECONDS)
            if ending.done():
                self.endings.forget(job_id)
            self.done += 1
        connection.close()

    async def _asked(self, connection: Connection, client: int, nth: int, number: int) -> str:
        """The job, asked for again under its key while forge is too busy to say yes."""
        who = user(client, nth)
        request = post(self.url, SUBMIT, swatch(self.first + number), who, f"soak-{number}")
        while True:
            status, body = await connection.ask(request)
            if status in (200, 202):
                return _accepted.decode(body).id
            if status != 503:
                raise RuntimeError(f"forge answered {status}: {body[:500]!r}")
            self.found.refused += 1
            await asyncio.sleep(0.2)


async def _emptied(sampler: Sampler, place: servers.Place, found: Found) -> Sample:
    """The first sample with nothing left, or the last one when patience ends.

    When the flow of jobs ends, most of what is left expires at once as seen from a day that is so much
    shorter: the brake then waits for an operator, as it should, and here is one.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS + found.ttl
    asked_again = time.monotonic()
    while True:
        sample = await sampler.take(found.jobs)
        over = sample.under_way == 0 and not any(sample.left.values())
        if over or time.monotonic() > deadline:
            return sample
        if sample.overdue and time.monotonic() > asked_again:
            found.operator += 1
            await _operator(place)
            asked_again = time.monotonic() + 10.0
        await asyncio.sleep(0.25)


async def _operator(place: servers.Place) -> None:
    words = [sys.executable, "-m", "forge", "cleanup", "--yes", "--json", "--reason", "expired"]
    child = await asyncio.create_subprocess_exec(
        *words, env=place.environ, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    await child.wait()


# ------------------------------------------------------------------ the verdict


Value = Callable[[Sample], float]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One row: what, what was reached, what is wanted; ``exact`` ones hold in a short run, too."""

    what: str
    reached: str
    wanted: str
    verdict: str = ""
    fails: bool = False
    exact: bool = False

    def told(self) -> harness.Figure:
        """As ``forge bench`` shows it; *unclear* is neither yes nor no."""
        met = None if self.verdict == "unclear" else not self.fails
        return harness.Figure(what=self.what, reached=self.reached, wanted=self.wanted, met=met)


def _plateau(found: Found) -> list[Sample]:
    """The samples behind the warm-up: a third of the jobs, and twice an asset's whole life."""
    life = found.ttl + GRACE_SECONDS
    return [s for s in found.samples if s.done >= found.jobs / 3 and s.at >= 2 * life]


def _series(found: Found, value: Value) -> Trend | None:
    return trend([(sample.done, value(sample)) for sample in _plateau(found)])


def _figures(found: Found, end: Sample) -> list[Figure]:
    return [*_exact(found, end), *_disk(found), *_memory(found), *_descriptors(found)]


def _exact(found: Found, end: Sample) -> list[Figure]:
    left = sum(end.left.values())
    named = ", ".join(f"{count} {what}" for what, count in end.left.items() if count)
    return [
        Figure(
            what="jobs completed",
            reached=f"{end.completed} of {end.jobs} in the table",
            wanted=str(found.jobs),
            fails=not end.completed == end.jobs == found.jobs,
            exact=True,
        ),
        Figure(
            what="left after the last life",
            reached=named or "nothing",
            wanted="nothing",
            fails=left > 0,
            exact=True,
        ),
    ]


def _disk(found: Found) -> list[Figure]:
    plateau = _plateau(found)
    stored = [s.file_bytes / s.pictures for s in plateau if s.pictures]
    if not stored:
        return []
    size = median(stored)
    files = median(s.files / s.pictures for s in plateau if s.pictures)
    rows: list[tuple[str, Value, float]] = [
        ("bytes on the asset volume", lambda s: s.file_bytes, DISK_SHARE * size),
        ("files on the asset volume", lambda s: s.files, DISK_SHARE * files),
    ]
    figures = []
    for what, value, limit in rows:
        slope = _series(found, value)
        said = verdict(slope, limit)
        reached = f"{median(map(value, plateau)):.0f}; a job {_shown(slope, 2)}"
        figures.append(
            Figure(
                what=what,
                reached=reached,
                wanted=f"≤ {limit:.2f} a job",
                verdict=said,
                fails=said != "flat",
            )
        )
    return figures


def _memory(found: Found) -> list[Figure]:
    figures = []
    for name in ("api", "worker"):
        slope, known = _series(found, _rss_of(name)), found.explained.get(name, 0.0)
        rest = slope.less(known) if slope else None
        said = verdict(rest, LEAK_BYTES)
        reached = f"{_shown(slope)} B a job, of which {known:.0f} it remembers on purpose"
        figures.append(
            Figure(
                what=f"memory of the {name}",
                reached=reached,
                wanted=f"the rest ≤ {LEAK_BYTES} B a job",
                verdict=said,
                fails=said == "grows",
            )
        )
    return figures


def _descriptors(found: Found) -> list[Figure]:
    figures = []
    for name in ("api", "worker", "nats"):
        slope = _series(found, _descriptors_of(name))
        said: Verdict = verdict(slope, DESCRIPTORS)
        counts = [s.descriptors[name] for s in _plateau(found)]
        reached = f"{min(counts, default=0)} to {max(counts, default=0)}; a job {_shown(slope, 4)}"
        figures.append(
            Figure(
                what=f"descriptors of {name}",
                reached=reached,
                wanted=f"≤ {DESCRIPTORS} a job",
                verdict=said,
                fails=said == "grows",
            )
        )
    return figures


def _rss_of(name: str) -> Value:
    return lambda sample: sample.rss[name]


def _descriptors_of(name: str) -> Value:
    return lambda sample: sample.descriptors[name]


def _shown(slope: Trend | None, digits: int = 0) -> str:
    return slope.shown(digits) if slope else "too few samples"


def _table(figures: Sequence[Figure]) -> Table:
    table = Table(title="what may not grow")
    for column in ("figure", "reached; slope (95 % interval)", "wanted", ""):
        table.add_column(column)
    for figure in figures:
        table.add_row(
            figure.what, figure.reached, figure.wanted, figure.verdict or ("no" if figure.fails else "yes")
        )
    return table


def _beside(found: Found, end: Sample) -> Table:
    table = Table(title="beside it")
    for column in ("figure", "value"):
        table.add_column(column)
    plateau = _plateau(found) or found.samples
    first, last = plateau[0], plateau[-1]
    jobs = max(1, last.done - first.done)
    rate = jobs / max(1e-9, last.at - first.at)
    pictures = median(s.pictures for s in plateau)
    lives = found.ttl + GRACE_SECONDS
    table.add_row("jobs a second", f"{found.jobs / found.seconds:.1f}; on the plateau {rate:.1f}")
    table.add_row("pictures on the plateau", f"{pictures:.0f}; rate × (life + grace) is {rate * lives:.0f}")
    due = [s.unlinks_due for s in plateau]
    table.add_row("unlinks that wait for the cleanup role", f"{median(due):.0f}, at most {max(due)}")
    table.add_row(
        "kB a job in the log",
        f"{_per_job(end.log_bytes, end)}, compressed on disk {_per_job(end.log_disk_bytes, end)}",
    )
    table.add_row("events a job", f"{end.log_messages / max(1, end.jobs):.1f}")
    table.add_row("kB a job in the tables", _per_job(last.database_bytes - first.database_bytes, jobs))
    for name in first.rss:
        slope = _series(found, _rss_of(name))
        table.add_row(
            f"MiB of {name}",
            f"{first.rss[name] / 2**20:.1f} → {last.rss[name] / 2**20:.1f}; B a job {_shown(slope)}",
        )
    table.add_row("asked again after a 503", str(found.refused))
    table.add_row("sockets lost", str(found.sockets_lost))
    table.add_row("an operator had to say yes", f"{found.operator} times, at the end")
    return table


def _per_job(size: int, of: Sample | int) -> str:
    jobs = of.jobs if isinstance(of, Sample) else of
    return f"{size / max(1, jobs) / 1e3:.2f}"


if __name__ == "__main__":
    main()
