"""All benchmarks, one after the other, then one table of what was reached: ``./forge bench [NAME…]``.

A benchmark is a module of this package that takes ``--short``, ``--json`` and ``--dir`` (and ``--rounds``,
unless it is one long round), prints its own tables, and writes JSON with an ``environment`` and, for the
table here, the ``figures`` of :class:`benchmarks.harness.Figure`. It runs in a process and on servers of its
own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Figure, environment, heading

NAMES = ("accept", "pipeline", "gap", "finish", "replay", "book", "assets", "memory", "start", "soak", "leak")
"""In the order of the report; each is run where its module is there."""

ONE_ROUND = ("soak", "leak", "book")

SHORT_SECONDS, HUNG = 900.0, 124
"""A short run that takes longer, beside whatever else, hangs, and ends with this status."""


class Told(msgspec.Struct):
    """What one benchmark wrote. ``exit_status`` is not 0 when it failed, or judged that something fails."""

    environment: dict[str, Any] = {}
    figures: list[Figure] = []
    exit_status: int = 0


def main() -> None:
    given = _command()
    console = Console(width=None if sys.stdout.isatty() else 170)
    where = environment(given.dir or Path(tempfile.gettempdir()))
    raw: dict[str, msgspec.Raw] = {}
    told: dict[str, Told] = {}
    for name in given.names or there():
        console.rule(name)
        told[name], raw[name] = _run(name, given)
    console.rule("forge bench")
    console.print(heading("where", where), soft_wrap=True)
    console.print(_table(told))
    failed = [name for name, one in told.items() if one.exit_status]
    if given.json:
        whole = {"environment": where, "short": given.short, "failed": failed, "benchmarks": raw}
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(whole)))
    sys.exit(f"ended with an error, or say no: {', '.join(failed)}" if failed else 0)


def there() -> list[str]:
    """The benchmarks of this checkout."""
    return [name for name in NAMES if Path(__file__).with_name(f"{name}.py").exists()]


def _command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="forge bench", description="Run benchmarks, all or those named.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(there()))
    parser.add_argument("--short", action="store_true", help="seconds each, to see that they work")
    parser.add_argument("--rounds", type=int, help="rounds of each pair [each benchmark's own]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value of every round here")
    parser.add_argument("--dir", type=Path, help="where the servers keep their files [/var/tmp]")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in there()]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; choose from {', '.join(there())}")
    return given


def _run(name: str, given: argparse.Namespace) -> tuple[Told, msgspec.Raw]:
    with tempfile.TemporaryDirectory(prefix="forge-bench-") as folder:
        file = Path(folder, "found.json")
        words = [sys.executable, "-m", f"benchmarks.{name}", *_options(name, given, file)]
        status = _status(words, SHORT_SECONDS if given.short else None)
        written = file.read_bytes() if file.exists() else b"{}"
    told = msgspec.json.decode(written, type=Told)
    told.exit_status = status
    return told, msgspec.Raw(written)


def _status(words: Sequence[str], seconds: float | None) -> int:
    try:
        return subprocess.run(words, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return HUNG


def _options(name: str, given: argparse.Namespace, file: Path) -> list[str]:
    options = ["--json", str(file)]
    if given.short:
        options.append("--short")
    if given.dir:
        options += ["--dir", str(given.dir)]
    if given.rounds and name not in ONE_ROUND:
        options += ["--rounds", str(given.rounds)]
    return options


def _table(told: Mapping[str, Told]) -> Table:
    table = Table(title="what was reached: median (least–most) of the runs")
    table.add_column("benchmark")
    table.add_column("figure")
    table.add_column("runs", justify="right")
    for column in ("reached", "beside it, in the same run", "wanted", ""):
        table.add_column(column)
    for name, one in told.items():
        for row in _rows(one):
            table.add_row(name, *row)
    return table


def _rows(one: Told) -> Sequence[Sequence[str]]:
    rows = [
        (figure.what, str(figure.runs), figure.reached, figure.beside, figure.wanted, _verdict(figure))
        for figure in one.figures
    ]
    if not rows:
        rows.append(("its own table stands above", "", "", "", "", ""))
    if one.exit_status:
        rows.append((f"[red]ended with exit status {one.exit_status}[/red]", "", "", "", "", "no"))
    return rows


def _verdict(figure: Figure) -> str:
    if figure.met is None:
        return "unclear" if figure.wanted else ""
    return "yes" if figure.met else "no"


if __name__ == "__main__":
    main()
