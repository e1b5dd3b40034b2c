"""Other services that hear of every asset."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from forge.cli.moments import Moment
from forge.cli.options import data_dir_option, report, system_settings

if TYPE_CHECKING:
    from nats.aio.client import Client

T = TypeVar("T")


@click.group()
def subscribers() -> None:
    """Add, list and remove services that read FORGE_ASSETS_READY.

    Each has a place of its own in the stream, kept while it is away. It connects to NATS as the user
    `subscriber`, who can read there and do nothing else: docs/SUBSCRIBERS.md, examples/subscriber.py.
    """


@subscribers.command("add")
@click.argument("name")
@click.option(
    "--from",
    "start",
    type=Moment(seq=True),
    metavar="TIME",
    help="First moment to hear of: `now`, `2h ago`, `2026-05-01T18:00:00Z`, or `seq:17` of the stream "
    "[everything that is there, up to a year].",
)
@click.option("--asset-type", "types", multiple=True, help="Only assets of this type; repeatable [all].")
@data_dir_option
def add_subscriber(
    name: str, start: datetime | int | None, types: tuple[str, ...], data_dir: Path | None
) -> None:
    """Keep a place for the service NAME; said again it does nothing."""
    from forge.subscribers import add

    _connected(data_dir, lambda nc: add(nc, name, start, types))
    report(f"{name} may read: examples/subscriber.py shows how")


@subscribers.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each, a line each.")
@data_dir_option
def list_subscribers(as_json: bool, data_dir: Path | None) -> None:
    """List them: what each has yet to hear, and whether it asks now."""
    import msgspec

    from forge.subscribers import listed

    for one in _connected(data_dir, listed):
        if as_json:
            click.echo(msgspec.json.encode(one).decode())
            continue
        asking = "asks now" if one.asking else "does not ask"
        kinds = ", ".join(one.types) or "all types"
        click.echo(f"{one.name}  {kinds}  {one.to_come} to come  acked up to seq:{one.acked}  {asking}")


@subscribers.command("remove")
@click.argument("name")
@data_dir_option
def remove_subscriber(name: str, data_dir: Path | None) -> None:
    """Forget the place of the service NAME."""
    from forge.subscribers import remove

    _connected(data_dir, lambda nc: remove(nc, name))
    report(f"{name} is removed")


def _connected(data_dir: Path | None, act: Callable[[Client], Awaitable[T]]) -> T:
    import asyncio

    from forge.subscribers import opened

    async def done() -> T:
        async with opened(system_settings(data_dir)) as nc:
            return await act(nc)

    return asyncio.run(done())
