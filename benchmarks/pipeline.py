"""How fast jobs go through forge when ComfyUI takes no time: ``python -m benchmarks.pipeline``.

A job is a flat picture of 64 by 64, from its POST to its end on the WebSocket, with 1, 10 and 100 in flight.
In the same rounds, on the same simulator: a bare client at its best, with 1 and 3 prompts in flight, that
submits, waits on the socket, reads the history, fetches and hashes, and keeps nothing.

We want the median of one job at a time within 10 ms of the bare client's, and 0.9 of its throughput.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets

from rich.table import Table

from benchmarks import harness, servers
from benchmarks.harness import Figure, Measured, Spread

IN_FLIGHT = {"bare": (1, 3), "forge": (1, 10, 100)}
_COLORS = 4_000_003
"""Between the first colours of two measurements, so that none finds the pictures of another one."""

Rounds = dict[str, dict[int, list[Measured]]]


def main() -> None:
    given = harness.command(__doc__.splitlines()[0] if __doc__ else "", rounds=7, seconds=4.0)
    with (
        servers.place(given.dir) as place,
        servers.simulator(place) as comfyui,
        servers.forge_worker(place, comfyui),
        servers.forge_api(place) as forge,
    ):
        where = harness.environment(place.root)
        rounds = asyncio.run(_rounds(given.rounds, given.seconds, place.pids, forge, comfyui))
    tables = [_table(rounds), _verdict(rounds), _costs(rounds)]
    harness.report(given, "pipeline", where, tables, rounds, _figures(rounds))


async def _rounds(count: int, seconds: float, pids: dict[str, int], forge: str, comfyui: str) -> Rounds:
    firsts = (secrets.randbelow(1 << 24) + nth * _COLORS for nth in itertools.count())

    async def measure(who: str, in_flight: int, seconds: float = seconds) -> Measured:
        module, url = {"bare": ("load_comfyui", comfyui), "forge": ("load_forge", forge)}[who]
        return await harness.measure(
            module, pids, url=url, in_flight=in_flight, first=next(firsts), seconds=seconds
        )

    for in_flight in (1, 10):  # everything is imported, connected and warm
        await measure("forge", in_flight, min(1.0, seconds))
    rounds: Rounds = {who: {nth: [] for nth in levels} for who, levels in IN_FLIGHT.items()}
    for _ in range(count):
        for who, levels in rounds.items():
            for in_flight, found in levels.items():
                found.append(await measure(who, in_flight))
    return rounds


def _table(rounds: Rounds) -> Table:
    table = Table(title="jobs through a ComfyUI that takes no time")
    for column in ("who", "in flight", "jobs /s", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right")
    for who, levels in rounds.items():
        for in_flight, found in levels.items():
            table.add_row(
                who,
                str(in_flight),
                harness.spread([one.rate for one in found]).shown(),
                harness.spread([one.p50_ms for one in found]).shown(2),
                harness.spread([one.p95_ms for one in found]).shown(2),
            )
    return table


def _verdict(rounds: Rounds) -> Table:
    table = Table(title="forge beside the bare client, round by round")
    for column in ("figure", "reached", "wanted"):
        table.add_column(column)
    best = _best(rounds)
    table.add_row("added to the median, 1 in flight", f"{_added(rounds).shown(2)} ms", "≤ 10 ms")
    for in_flight, found in rounds["forge"].items():
        share = harness.ratio([one.rate for one in found], best)
        table.add_row(f"throughput, {in_flight} in flight", share.shown(2), "≥ 0.9" if in_flight > 1 else "")
    return table


def _best(rounds: Rounds) -> list[float]:
    """The rate of the better bare client, round by round."""
    return [max(a.rate, b.rate) for a, b in zip(*rounds["bare"].values(), strict=True)]


def _figures(rounds: Rounds) -> list[Figure]:
    bare, best = rounds["bare"][1], _best(rounds)
    p50 = harness.spread([one.p50_ms for one in bare]).median
    figures = [
        harness.figure(
            "added to a job's median, 1 in flight",
            _added(rounds),
            "ms",
            runs=len(bare),
            digits=1,
            beside=f"bare client {p50:.1f} ms",
            at_most=10,
        )
    ]
    for in_flight, found in rounds["forge"].items():
        rates = [one.rate for one in found]
        figures.append(
            harness.figure(
                f"jobs/s of the better bare client, {in_flight} in flight",
                harness.ratio(rates, best),
                runs=len(found),
                beside=f"{harness.spread(rates).median:.0f} of {harness.spread(best).median:.0f} /s",
                at_least=0.9 if in_flight > 1 else None,
            )
        )
    return figures


def _added(rounds: Rounds) -> Spread:
    mine, bare = rounds["forge"][1], rounds["bare"][1]
    return harness.difference([one.p50_ms for one in mine], [one.p50_ms for one in bare])


def _costs(rounds: Rounds) -> Table:
    names = ("simulator", "worker", "api", "nats", "postgres")
    table = Table(title="CPU milliseconds for one job")
    for column in ("who", "in flight", *names):
        table.add_column(column, justify="right")
    for who, levels in rounds.items():
        for in_flight, found in levels.items():
            spent = (harness.spread([one.cpu_ms[name] for one in found]).shown(2) for name in names)
            table.add_row(who, str(in_flight), *spent)
    return table


if __name__ == "__main__":
    main()
