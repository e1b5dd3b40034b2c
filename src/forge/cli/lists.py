"""What lists of jobs and assets share: how many, and how a line looks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from forge.cli.options import report

if TYPE_CHECKING:
    from forge.listing import Told

Line = Callable[[Any], str]


def some(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how many, and how."""

    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object for each, a line each."),
        click.option("--all", "every", is_flag=True, help="All there are."),
        click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="At most that."),
    ):
        command = option(command)
    return command


def listed(found: AsyncGenerator[Any], limit: int | None, what: str, line: Line | None) -> None:
    """Print each as it comes: as ``line`` has it, or as JSON."""
    if asyncio.run(printed(found, line)) == limit:
        report(f"{limit} {what}, there may be more: --limit N, or --all")


async def printed(found: AsyncGenerator[Any], line: Line | None) -> int:
    """How many there were. Whoever reads may leave before the end, as in `forge jobs | head`."""
    import msgspec

    count = 0
    async with aclosing(found):
        async for one in found:
            click.echo(line(one) if line else msgspec.json.encode(one).decode())
            count += 1
    return count


def columns(widths: Mapping[str, int], row: Callable[[Any], tuple[Any, ...]]) -> Line:
    """Prints the names of the columns at once; then a line for each row. What is longer than its column stays
    whole."""

    def line(values: tuple[Any, ...]) -> str:
        cells = (_plain(value).ljust(width) for value, width in zip(values, widths.values(), strict=True))
        return "  ".join(cells).rstrip()

    click.echo(line(tuple(name.upper() for name in widths)))
    return lambda one: line(row(one))


def show_told(telling: Coroutine[Any, Any, Told], as_json: bool) -> None:
    """One thing and its history."""
    import msgspec

    told = asyncio.run(telling)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(told), indent=2).decode())
        return
    if told.now is None:
        click.echo("it is gone; this happened to it:")
    else:
        for name, value in msgspec.to_builtins(told.now).items():
            click.echo(
                f"{name:18}{_plain(value if isinstance(value, str) else msgspec.json.encode(value).decode())}"
            )
    click.echo()
    for item in told.history:
        data = msgspec.json.encode(item.data).decode()
        click.echo(f"{item.seq:>8}  {clock(item.at)}  {item.type:20}  {_plain(item.actor)}  {data}")


def clock(moment: datetime) -> str:
    """On this machine's clock, to the second."""
    return f"{moment.astimezone():%F %T}"


def span(since: datetime, until: datetime) -> str:
    return f"{(until - since).total_seconds():.1f} s"


def _plain(value: Any) -> str:
    """Without what could move a terminal's cursor: ids are their users' own words."""
    return "".join(sign if sign.isprintable() else "�" for sign in str(value))
