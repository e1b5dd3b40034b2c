"""How long ``forge replay all`` takes: ``python -m benchmarks.replay [--events N]``.

A log of jobs of all fates (:mod:`benchmarks.story`) is replayed into an empty database, in turn with its two
yardsticks (A B C A B C …): the same stream read in order with nats-py and thrown away, and the resulting rows
put with COPY, from a file, into tables with the indexes that ours have. CPU is of the process, Postgres and
nats-server together: on a busy machine it says more than time does.

We want half the events a second of the slower of the two.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable

import asyncpg
import msgspec
import psutil
from rich.table import Table

from benchmarks import harness, servers, story
from forge import database
from forge.broker import connect
from forge.workers.projector import PROJECTIONS

TABLES = [table.name for projection in PROJECTIONS for table in projection.tables]
AT_LEAST = 0.5


class Run(msgspec.Struct, frozen=True):
    """One run: seconds, and seconds of CPU of everybody involved."""

    seconds: float
    cpu: float


Found = dict[str, list[Run]]


class Bench:
    """The servers with the log in them, and a fresh database for each run."""

    def __init__(self, place: servers.Place, events: int) -> None:
        self.place, self.events = place, events
        self.base = place.environ["FORGE_POSTGRES_DSN"]
        self.nats_url = place.environ["FORGE_NATS_URL"]
        self.rows = place.root / "rows"
        self.numbers = iter(range(10**6))

    async def prepare(self) -> None:
        """Write the log, and keep the rows that come of it as COPY has them."""
        nc = await connect(self.nats_url, "bench")
        await story.write(nc, self.events)
        await nc.close()
        dsn = await self._database()
        self._replay(dsn)
        self.rows.mkdir()
        connection = await asyncpg.connect(dsn)
        for name in TABLES:
            columns = await self._columns(connection, name)
            await connection.copy_from_table(name, columns=columns, output=self.rows / name, format="binary")
        await connection.close()

    async def replay(self) -> Run:
        dsn = await self._database()
        return self._timed(lambda: self._replay(dsn))

    async def read(self) -> Run:
        words = [sys.executable, "-m", "benchmarks.load_read", "--url", self.nats_url]

        def read() -> float:
            done = subprocess.run(
                [*words, "--events", str(self.events)], check=True, capture_output=True, text=True
            )
            return float(done.stdout)

        return self._timed(read)

    async def copy(self) -> Run:
        connection = await asyncpg.connect(await self._database())
        columns = {name: await self._columns(connection, name) for name in TABLES}
        before, began = self._cpu(), time.perf_counter()
        for name in TABLES:
            await connection.copy_to_table(
                name, columns=columns[name], source=self.rows / name, format="binary", timeout=None
            )
        run = Run(time.perf_counter() - began, self._cpu() - before)
        await connection.close()
        return run

    def _replay(self, dsn: str) -> float:
        environ = self.place.environ | {"FORGE_POSTGRES_DSN": dsn}
        done = subprocess.run(
            [sys.executable, "-m", "forge", "replay", "all", "--json"],
            check=True,
            capture_output=True,
            env=environ,
        )
        told = msgspec.json.decode(done.stdout)
        if told["events"] != self.events:
            raise SystemExit(f"{told['events']} events were replayed of {self.events}")
        return float(told["seconds"])

    def _timed(self, work: Callable[[], float]) -> Run:
        before = self._cpu()
        return Run(work(), self._cpu() - before)

    def _cpu(self) -> float:
        own = psutil.Process().cpu_times()
        spent = own.user + own.system + own.children_user + own.children_system
        return spent + sum(map(harness.cpu_seconds, self.place.pids.values()))

    async def _database(self) -> str:
        name = f"replay_{next(self.numbers)}"
        connection = await asyncpg.connect(self.base)
        await connection.execute(f"create database {name}")
        await connection.close()
        dsn = self.base.replace("/postgres?", f"/{name}?")
        await database.migrate(dsn)
        return dsn

    @staticmethod
    async def _columns(connection: asyncpg.Connection, table: str) -> list[str]:
        rows = await connection.fetch(
            "select column_name from information_schema.columns"
            " where table_schema = 'public' and table_name = $1 and is_generated = 'NEVER'"
            " order by ordinal_position",
            table,
        )
        return [row[0] for row in rows]


async def measured(bench: Bench, rounds: int) -> Found:
    await bench.prepare()
    found: Found = {"replay": [], "read": [], "copy": []}
    for _ in range(rounds):
        found["read"].append(await bench.read())
        found["replay"].append(await bench.replay())
        found["copy"].append(await bench.copy())
    return found


def main() -> None:
    given = harness.command(
        __doc__.splitlines()[0] if __doc__ else "",
        3,
        0,
        ("--events", {"type": int, "default": 200_000, "help": "length of the log [%(default)s]"}),
    )
    if given.short:
        given.events = 6_000
    with servers.place(given.dir) as place:
        where = harness.environment(place.root)
        found = asyncio.run(measured(Bench(place, given.events), given.rounds))
    how = f"{given.rounds} rounds of {given.events} events; median (least–most) of the rounds"
    harness.show("replay", where, how, [_table(found, given.events)])
    harness.write(
        given.json, "replay", where, events=given.events, rounds=found, figures=_figures(found, given.events)
    )


def _rates(runs: list[Run], events: int) -> list[float]:
    return [events / run.seconds for run in runs]


def _table(found: Found, events: int) -> Table:
    table = Table(title="a log into Postgres")
    for column in ("what", "events/s", "µs of CPU an event"):
        table.add_column(column, justify="right")
    names = {
        "replay": "forge replay all",
        "read": "read in order and thrown away",
        "copy": "COPY of the rows that come of it",
    }
    for what, name in names.items():
        cpu = harness.spread([run.cpu / events * 1e6 for run in found[what]])
        table.add_row(name, harness.spread(_rates(found[what], events)).shown(0), cpu.shown())
    return table


def _figures(found: Found, events: int) -> list[harness.Figure]:
    replay, read, copy = (_rates(found[what], events) for what in ("replay", "read", "copy"))
    slower = [min(pair) for pair in zip(read, copy, strict=True)]
    runs, told = len(replay), f"{harness.spread(replay).median:.0f} of"
    return [
        harness.figure(
            "replay, of the slower of reading and COPY",
            harness.ratio(replay, slower),
            "×",
            runs=runs,
            beside=f"{told} {harness.spread(slower).median:.0f} events/s",
            at_least=AT_LEAST,
        ),
        harness.figure(
            "replay, of reading in order",
            harness.ratio(replay, read),
            "×",
            runs=runs,
            beside=f"{told} {harness.spread(read).median:.0f} events/s",
        ),
        harness.figure(
            "replay, of COPY",
            harness.ratio(replay, copy),
            "×",
            runs=runs,
            beside=f"{told} {harness.spread(copy).median:.0f} events/s",
        ),
    ]


if __name__ == "__main__":
    main()
