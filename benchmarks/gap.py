"""How long ComfyUI stands still while jobs wait for it: ``python -m benchmarks.gap``.

Ten jobs are in flight all the time, each a flat picture of 64 by 64 for which the simulated sampler takes 50,
200 or 1000 ms. The simulator's own record says when it ended one prompt and when it started the next: the
time between, of the whole time, is what it stood still. *Dry* counts how often nothing was queued there when
it ended one. While something is queued, the pause is the simulator's own: it serves HTTP in the same thread.

We want at most 1 % with jobs of 200 ms.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from typing import Any

import httpx
import msgspec
from rich.table import Table

from benchmarks import harness, servers
from benchmarks.harness import Figure

RENDER_MS = (50, 200, 1000)
SHORT_RENDER_MS = (50, 200)
IN_FLIGHT = 10
WANTED = {200: 1.0}
"""Percent, by the milliseconds of a job."""

_LEAST_JOBS = 8
_RAMP = 3
"""Prompts from the first on that do not count: until then the places were not all taken."""


class Idle(msgspec.Struct, frozen=True):
    """What the record of one measurement says; times in milliseconds."""

    jobs: int
    percent: float
    longest_ms: float
    dry: int


Rounds = dict[int, list[Idle]]


def main() -> None:
    given = harness.command(__doc__.splitlines()[0] if __doc__ else "", rounds=5, seconds=6.0)
    renders = SHORT_RENDER_MS if given.short else RENDER_MS
    with (
        servers.place(given.dir) as place,
        servers.simulator(place) as comfyui,
        servers.forge_worker(place, comfyui),
        servers.forge_api(place) as forge,
    ):
        where = harness.environment(place.root)
        rounds = asyncio.run(_rounds(given.rounds, given.seconds, renders, forge, comfyui))
    harness.report(given, "gap", where, [_table(rounds)], rounds, _figures(rounds))


async def _rounds(count: int, seconds: float, renders: tuple[int, ...], forge: str, comfyui: str) -> Rounds:
    firsts = (secrets.randbelow(1 << 24) + nth * 4_000_003 for nth in itertools.count())
    rounds: Rounds = {render: [] for render in renders}
    async with httpx.AsyncClient(base_url=comfyui, timeout=harness.PATIENCE_SECONDS) as simulator:
        for nth in range(-1, count):
            for render, found in rounds.items():
                if nth < 0 and render != renders[0]:
                    continue  # one short run is enough to have everything imported, connected and warm
                (await simulator.post("/simulator/render", json={"least_ms": render})).raise_for_status()
                longer = max(seconds, _LEAST_JOBS * render / 1000) if nth >= 0 else 0.4
                record = list[dict[str, Any]]()
                while _jobs(record) < _LEAST_JOBS:  # on a machine too busy for more in so many seconds
                    before = len(await _events(simulator))
                    await harness.measure(
                        "load_forge", url=forge, in_flight=IN_FLIGHT, first=next(firsts), seconds=longer
                    )
                    record = (await _events(simulator))[before:]
                if nth >= 0:
                    found.append(idle(record))
    return rounds


def _jobs(record: list[dict[str, Any]]) -> int:
    return sum(line["event"] == "ended" for line in record)


async def _events(simulator: httpx.AsyncClient) -> list[dict[str, Any]]:
    answer = await simulator.get("/simulator/record", params={"events": ""})
    events: list[dict[str, Any]] = answer.raise_for_status().json()["events"]
    return events


def idle(record: list[dict[str, Any]]) -> Idle:
    """How long nothing ran between the first prompt that counts and the end of the last one.

    Args:
        record: events of the simulator in order, each with ``event``, ``at`` (Unix seconds) and ``present``
            (how many prompts it has right after it).
    """
    runs = [line for line in record if line["event"] in ("started", "ended")][2 * _RAMP :]
    ends, starts = runs[1:-1:2], runs[2::2]
    gaps = [start["at"] - end["at"] for end, start in zip(ends, starts, strict=True)]
    whole = runs[-1]["at"] - runs[0]["at"]
    return Idle(
        jobs=len(runs) // 2,
        percent=100 * sum(gaps) / whole,
        longest_ms=1e3 * max(gaps),
        dry=sum(end["present"] == 0 for end in ends),
    )


def _table(rounds: Rounds) -> Table:
    table = Table(title=f"time in which ComfyUI stood still, {IN_FLIGHT} jobs in flight")
    for column in ("ms a job", "jobs", "of the time %", "longest ms", "dry"):
        table.add_column(column, justify="right")
    for render, found in rounds.items():
        table.add_row(
            str(render),
            str(sum(one.jobs for one in found)),
            harness.spread([one.percent for one in found]).shown(2),
            harness.spread([one.longest_ms for one in found]).shown(1),
            str(sum(one.dry for one in found)),
        )
    return table


def _figures(rounds: Rounds) -> list[Figure]:
    return [
        harness.figure(
            f"ComfyUI idle between jobs of {render} ms",
            harness.spread([one.percent for one in found]),
            "%",
            runs=len(found),
            beside=f"{sum(one.dry for one in found)} of {sum(one.jobs for one in found)} times none queued",
            at_most=WANTED.get(render),
        )
        for render, found in rounds.items()
    ]


if __name__ == "__main__":
    main()
