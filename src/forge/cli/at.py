"""Looking at the past."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge.cli.moments import Moment
from forge.cli.options import data_dir_option, system_settings

if TYPE_CHECKING:
    from rich.table import Table

    from forge.past import Told

STATUSES = ("pending", "running", "completed", "failed", "cancelled")

_PIPED = 240
"""Columns of a line where no terminal says how many it has."""


@click.command()
@click.argument("when", metavar="TIME", type=Moment(seq=True))
@click.argument("what", type=click.Choice(["queue", "limits", "inventory"]))
@data_dir_option
@click.option("--user", help="As this user saw it [as an operator: everybody's].")
@click.option("--status", "statuses", multiple=True, type=click.Choice(STATUSES), help="Repeatable.")
@click.option("--job-type", help="Only jobs of this type.")
@click.option("--asset-type", help="Only assets of this type.")
@click.option("--session", help="Only this session's assets, or its limit.")
@click.option("--character", help="Only this character's assets, or its limit.")
@click.option("--limit", type=click.IntRange(1, 100_000), default=50, show_default=True, help="Rows.")
@click.option("--json", "as_json", is_flag=True, help="As the API says it, with `as_of`.")
def at(
    when: datetime | int,
    what: Any,
    data_dir: Path | None,
    user: str | None,
    statuses: tuple[str, ...],
    job_type: str | None,
    asset_type: str | None,
    session: str | None,
    character: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """Show the queue, the limits or the library as they were.

    \b
    TIME is  2026-05-01T18:00:00Z   a moment; without an offset on this machine's clock
             2h ago, 90m ago, 3d ago, now
             yesterday 18:00, 18:00
             seq:12345              right after this event of the log

    Told by the log alone, which is read from its beginning by the rules that the live system goes by.
    Allowed numbers that are settings are those of now. Pictures need not be there any more.
    """
    from forge.domain.jobs import Status
    from forge.past import Asked, run

    asked = Asked(
        when=when,
        what=what,
        user=user,
        statuses=tuple(map(Status, statuses)),
        job_type=job_type,
        asset_type=asset_type,
        session_id=session,
        character_id=character,
        limit=limit,
    )
    with reading(hidden=as_json) as progress:
        told = run(system_settings(data_dir), asked, progress)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(told.as_json()), indent=2).decode())
    else:
        _show(told)


@contextmanager
def reading(*, hidden: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar of the events that were read, where somebody looks at it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("reading the log"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=hidden or not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def _show(told: Told) -> None:
    as_of = told.as_of
    when = f"{as_of.at.astimezone():%F %T %z}" if as_of.at else "before anything happened"
    _printed(f"as of seq:{as_of.seq}, {when}; {as_of.events} events read", *_tables(told))


def _printed(*parts: str | Table) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = _PIPED
    for one in parts:
        console.print(one)


def _tables(told: Told) -> Iterator[Table]:
    from forge.api.schemas import AssetPage, LimitsView, QueuePage

    match told.state:
        case QueuePage(items=items, counts=counts):
            columns = ("place", "id", "status", "user", "type", "priority", "attempts", "since")
            rows = [
                (j.position, j.id, j.status, j.user_id, j.job_type, j.priority, j.attempts, j.created_at)
                for j in items
            ]
            yield _table(", ".join(f"{count} {status}" for status, count in counts.items()), columns, rows)
        case AssetPage(items=items, total_estimate=total):
            columns = ("id", "type", "user", "character", "size", "bytes", "since", "until")
            yield _table(f"{len(items)} of {total} assets", columns, map(_asset, items))
        case LimitsView() as limits:
            yield _limits(limits)
        case everybody:
            for limits in everybody:
                yield _limits(limits)


def _asset(asset: Any) -> tuple[Any, ...]:
    until = "pinned" if asset.pinned else asset.expires_at
    named = (asset.id, asset.asset_type, asset.user_id, asset.character_id)
    return (*named, asset.dimensions, asset.file_size_bytes, asset.created_at, until)


def _limits(limits: Any) -> Table:
    rows = [(item.of, item.name, item.used, item.allowed, item.resets_at) for item in limits.items]
    return _table(limits.user_id, ("of", "limit", "used", "allowed", "resets at"), rows)


def _table(title: str, columns: tuple[str, ...], rows: Any) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=True, min_width=36 if column == "id" else None)  # to be copied
    for row in rows:
        table.add_row(*(escape(_said(value)) for value in row))
    return table


def _said(value: Any) -> str:
    if isinstance(value, datetime):
        return f"{value.astimezone():%F %T}"
    return "" if value is None else str(value)
