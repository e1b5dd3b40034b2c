"""Does memory grow with jobs? 1000 through real processes, and a verdict: ``python -m benchmarks.leak``.

Behind a warm-up the memory of API and worker, children included, is looked at every few jobs. Its slope comes
with a 95 % interval (:mod:`benchmarks.trend`); what a process keeps of the log on purpose is measured on that
very log and taken off. *flat*: surely at most 512 bytes a job. *grows*: surely more. *unclear*: this run does
not tell.

``--plant 2048`` has both processes keep 2048 bytes of each job for ever, which has to end with *grows*.
Ends with 1 when something grows. ``--short`` only proves that all this works: it judges nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import psutil
from rich.table import Table

from benchmarks import harness, servers
from benchmarks.harness import Figure
from benchmarks.remembered import explained
from benchmarks.soak import LEAK_BYTES, Load
from benchmarks.trend import Trend, trend, verdict

JOBS, WARM_UP, SHORT = 1000, 4000, 40
NAMES = ("api", "worker")


class Look(msgspec.Struct, frozen=True):
    """Resident bytes of each process and its children, after so many jobs."""

    done: int
    rss: dict[str, int]


class Found(msgspec.Struct):
    """What the run showed."""

    jobs: int
    seconds: float = 0.0
    refused: int = 0
    sockets_lost: int = 0
    samples: list[Look] = []
    explained: dict[str, float] = {}


class Looker:
    """What :class:`benchmarks.soak.Load` asks now and then."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._families = {
            name: [psutil.Process(pids[name]), *psutil.Process(pids[name]).children(recursive=True)]
            for name in NAMES
        }

    async def take(self, done: int) -> Look:
        rss = {name: sum(one.memory_info().rss for one in all_) for name, all_ in self._families.items()}
        return Look(done, rss)


def main() -> None:
    given = _command()
    command = ("benchmarks.leaking", str(given.plant)) if given.plant else ("forge",)
    with servers.place(given.dir) as place, ExitStack() as stack:
        place.environ["FORGE_RATE_PER_HOUR"] = "0"
        comfyui = stack.enter_context(servers.simulator(place))
        stack.enter_context(servers.forge_worker(place, comfyui, command))
        forge = stack.enter_context(servers.forge_api(place, command=command))
        where = harness.environment(place.root)
        found = asyncio.run(_run(given, place, forge))
    trends = {name: None if given.short else _trend(found, given.warm_up, name) for name in NAMES}
    figures = [_figure(found, name, trends[name]) for name in NAMES]
    planted = f"{given.plant} bytes a job are leaked on purpose" if given.plant else "nothing planted"
    how = f"{given.jobs} jobs behind {given.warm_up} of warm-up, {found.seconds:.0f} s; {planted}"
    harness.show("leak", where, how, [_table(found, figures)])
    harness.write(given.json, "leak", where, plant=given.plant, found=found, trends=trends, figures=figures)
    growing = [figure.what for figure in figures if figure.met is False]
    sys.exit(f"grows: {', '.join(growing)}" if growing else 0)


def _command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--short", action="store_true", help="some seconds, to see that it works")
    parser.add_argument("--jobs", type=int, default=JOBS, help="behind the warm-up [%(default)s]")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help="jobs before them [%(default)s]")
    parser.add_argument("--in-flight", type=int, default=12, help="jobs under way at once [%(default)s]")
    parser.add_argument("--plant", type=int, default=0, metavar="BYTES", help="leak so many a job on purpose")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument("--dir", type=Path, help="where the servers keep their files [/var/tmp]")
    given = parser.parse_args()
    if given.short:
        given.jobs = given.warm_up = SHORT
    return given


async def _run(given: argparse.Namespace, place: servers.Place, forge: str) -> Found:
    found = Found(given.warm_up + given.jobs)
    began = time.monotonic()
    await Load(forge, found.jobs, given.in_flight, Looker(place.pids), found).run()
    found.seconds = time.monotonic() - began
    if not given.short:
        found.explained = await explained(place.environ["FORGE_NATS_URL"], given.warm_up)
    return found


# ------------------------------------------------------------------ the verdict


def _trend(found: Found, warm_up: int, name: str) -> Trend | None:
    """The slope behind the warm-up, without what is kept on purpose."""
    slope = trend([(look.done, look.rss[name]) for look in found.samples if look.done >= warm_up])
    return slope.less(found.explained.get(name, 0.0)) if slope else None


def _figure(found: Found, name: str, rest: Trend | None) -> Figure:
    said = verdict(rest, LEAK_BYTES)
    return Figure(
        what=f"memory of the {name}",
        reached=f"{rest.shown()} B a job: {said}" if rest else "too few samples",
        beside=f"{found.explained.get(name, 0.0):.0f} B a job kept on purpose, taken off",
        wanted=f"≤ {LEAK_BYTES} B a job",
        met={"flat": True, "grows": False, "unclear": None}[said],
    )


def _table(found: Found, figures: list[Figure]) -> Table:
    table = Table(title="memory that is not explained, bytes a job; slope (95 % interval)")
    for column in ("what", "found", "beside", "wanted", "MiB, first and last"):
        table.add_column(column)
    for name, figure in zip(NAMES, figures, strict=True):
        ends = [found.samples[at].rss[name] / 2**20 for at in (0, -1)]
        size = f"{ends[0]:.1f} → {ends[1]:.1f}"
        table.add_row(figure.what, figure.reached, figure.beside, figure.wanted, size)
    return table


if __name__ == "__main__":
    main()
