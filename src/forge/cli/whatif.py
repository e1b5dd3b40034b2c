"""Trying other limits on what was."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge.cli.at import reading
from forge.cli.moments import Moment
from forge.cli.options import data_dir_option, system_settings

if TYPE_CHECKING:
    from forge.whatif import Comparison, Figures, Spread

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}I": 1024**nth for nth, unit in enumerate("KMGT", 1)}


def size(text: str) -> int:
    """`50GB` → bytes; also KB, MB, TB, KiB, MiB, GiB, TiB.

    Raises:
        ValueError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size: say 50GB")
    return int(float(found[1]) * _UNITS[found[2]])


def _size(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    try:
        return None if text is None else size(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@data_dir_option
@click.option("--rate-per-hour", type=click.IntRange(0), help="Generations a user may ask for; 0: any.")
@click.option("--slots", type=click.IntRange(1), help="Jobs at ComfyUI at once, drawn or waiting there [3].")
@click.option("--gpus", type=click.IntRange(1), help="Prompts drawn at once, one each [1].")
@click.option("--queue-per-user", type=click.IntRange(1), help="Jobs of a user that are not over [10].")
@click.option("--queue-limit", type=click.IntRange(1), help="Waiting jobs in all.")
@click.option("--ttl-days", type=click.FloatRange(0, min_open=True), help="How long assets live.")
@click.option("--disk-limit", metavar="SIZE", callback=_size, help="Size of the asset volume, like 50GB.")
@click.option("--since", metavar="TIME", type=Moment(), help="Only requests from then on.")
@click.option("--until", metavar="TIME", type=Moment(), help="Only requests up to then.")
@click.option(
    "--by",
    type=click.Choice(["priority", "user"]),
    default="priority",
    show_default=True,
    help="Waits of each.",
)
@click.option("--json", "as_json", is_flag=True, help="Say it as one JSON object.")
def whatif(
    data_dir: Path | None,
    ttl_days: float | None,
    since: datetime | None,
    until: datetime | None,
    by: str,
    as_json: bool,
    **limits: int | None,
) -> None:
    """Replay recorded requests through other limits.

    Shows waits, refusals, GPU use and disk under the given limits, beside the present ones and what was
    recorded. Requests that were refused left no event: they are in no column, and who was refused may have
    asked again. Requests come when they came, whatever becomes of those before. Thumbnails and the time that
    forge itself takes are not counted. Nothing is changed.
    """
    from forge.whatif import run

    changes: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}
    if ttl_days is not None:
        changes |= {"ttl_seconds": max(1, round(ttl_days * 86400)), "ttls": {}}
    with reading(hidden=as_json) as progress:
        found = run(system_settings(data_dir), changes, since, until, by, progress)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        _show(found, by)


def _show(found: Comparison, by: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{found.requests} requests, {found.events} events read", title_justify="left")
    for column in ("", "recorded", "present limits", "given limits"):
        table.add_column(column, justify="left" if not column else "right")
    columns = (found.recorded, found.under_present, found.under_given)
    for name, said in _rows(columns, by):
        table.add_row(escape(name), *said)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("wait: until at ComfyUI; done: until the pictures are there (seconds: p50 / p95 / max)")


def _rows(columns: tuple[Figures, ...], by: str) -> list[tuple[str, list[str]]]:
    outcomes = sorted({outcome for figures in columns for outcome in figures.jobs})
    limits = sorted({limit for figures in columns for limit in figures.refused or {}})
    groups = list(columns[0].wait_by)
    rows = [(outcome, [str(f.jobs.get(outcome, 0)) for f in columns]) for outcome in outcomes]
    rows += [(f"refused: {limit}", [_refused(f, limit) for f in columns]) for limit in limits]
    rows.append(("wait", [_spread(f.wait) for f in columns]))
    rows += [(f"wait, {by} {g}", [_spread(f.wait_by.get(g)) for f in columns]) for g in groups]
    rows.append(("done", [_spread(f.done) for f in columns]))
    rows.append(("GPU in use", [f"{f.utilisation:.0%}" for f in columns]))
    rows.append(("disk, peak", [_bytes(f.disk_peak_bytes) for f in columns]))
    rows.append(("disk, at the end", [_bytes(f.disk_end_bytes) for f in columns]))
    return rows


def _refused(figures: Figures, limit: str) -> str:
    return "not known" if figures.refused is None else str(figures.refused.get(limit, 0))


def _spread(spread: Spread | None) -> str:
    if spread is None or spread.p50 is None:
        return "-"
    return f"{spread.p50:.1f} / {spread.p95:.1f} / {spread.max:.1f}"


def _bytes(count: int) -> str:
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"
