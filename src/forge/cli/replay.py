"""Rebuilding tables from the log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge.cli.options import data_dir_option, system_settings

if TYPE_CHECKING:
    from forge.replaying import Rebuilt, Step

PROJECTIONS = ("queue", "inventory", "stats", "uploads", "usage")
_PLAIN_SECONDS = 2.0


@click.command()
@click.argument("names", nargs=-1, metavar="NAME", type=click.Choice([*PROJECTIONS, "all"]))
@data_dir_option
@click.option("--replace", is_flag=True, help="Also where the live tables differ; those are kept.")
@click.option("--drop-old", is_flag=True, help="Let go the tables that were kept, and do nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Say what was done as one JSON object.")
def replay(
    names: tuple[str, ...], data_dir: Path | None, replace: bool, drop_old: bool, as_json: bool
) -> None:
    """Rebuild tables from the log while forge serves.

    Each NAME is one of these; any number at once.

    \b
    queue      generation_queue: every job
    inventory  asset_inventory, asset_reference, asset_usage
    stats      generation_stats: what came of jobs, by hour
    uploads    upload: the pictures that users sent
    usage      resource_usage_log: samples of disk and memory
    all        every one of them

    The rebuilt tables are made beside the live ones, compared with them at one event, and put in their place
    in one transaction; nothing has to be stopped. Where they are not the same byte for byte, nothing is
    changed: exit status 2, with some of the rows. With --replace the log wins, and the old tables are kept in
    the schema forge_before until the next replay or --drop-old. A replay that was interrupted or killed is
    simply run again; of two at once the second is refused.
    """
    import gc

    import uvloop

    from forge import bootstrap

    gc.set_threshold(100_000, 50, 100)  # thousands of events are in hand at a time, and none in a circle

    if drop_old:
        if names or replace:
            raise click.UsageError("--drop-old stands alone")
        gone = uvloop.run(bootstrap.drop_old(system_settings(data_dir)))
        click.echo("the kept tables are gone" if gone else "no tables were kept")
        return
    if not names:
        raise click.UsageError(f"say what to rebuild: {', '.join(PROJECTIONS)}, or all")
    chosen = PROJECTIONS if "all" in names else names
    with _shown(hidden=as_json) as progress:
        work = bootstrap.replay(system_settings(data_dir), chosen, replace=replace, progress=progress)
        rebuilt = uvloop.run(work)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(rebuilt), indent=2).decode())
    else:
        _say(rebuilt)


def _say(rebuilt: Rebuilt) -> None:
    rate = rebuilt.events / max(rebuilt.seconds, 0.001)
    click.echo(
        f"{', '.join(rebuilt.projections)}: {rebuilt.events} events in {rebuilt.seconds:.1f} s ({rate:.0f}/s)"
    )
    differing = {one.table for one in rebuilt.differences}
    if rebuilt.compared and not differing:
        click.echo(f"the same as before, byte for byte: {', '.join(rebuilt.compared)}")
    for one in rebuilt.differences:
        click.echo(
            f"{one.table} had {one.live_rows} rows and has {one.rebuilt_rows} now; {_examples(one.examples)}"
        )
    if alone := [name for name in rebuilt.projections if name not in rebuilt.compared]:
        click.echo(f"there was nothing of this version to compare with: {', '.join(alone)}")
    if rebuilt.kept:
        click.echo(
            "the tables of before are in the schema forge_before; forge replay --drop-old lets them go"
        )


def _examples(keys: tuple[str, ...]) -> str:
    return f"different for example {', '.join(keys)}"


@contextmanager
def _shown(*, hidden: bool) -> Iterator[Callable[[Step], None]]:
    """A bar where somebody looks at it, a line now and then where not."""
    from rich.console import Console

    console = Console(stderr=True)
    if hidden or not console.is_terminal:
        yield (lambda _: None) if hidden else _lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, rate="")
        phase, began, first = "", time.monotonic(), 0

        def show(step: Step) -> None:
            nonlocal phase, began, first
            if step.what != phase:
                bar.reset(task, total=step.of, description=step.what)
                phase, began, first = step.what, time.monotonic(), step.done
            bar.update(task, completed=step.done, total=step.of, rate=_rate(step, began, first))

        yield show


def _lines() -> Callable[[Step], None]:
    phase, said, began, first = "", 0.0, 0.0, 0

    def show(step: Step) -> None:
        nonlocal phase, said, began, first
        now = time.monotonic()
        if step.what != phase:
            phase, began, first = step.what, now, step.done
        elif now - said < _PLAIN_SECONDS:
            return
        said = now
        print(f"{step.what}: {step.done} of {step.of} {_rate(step, began, first)}".rstrip(), file=sys.stderr)

    return show


def _rate(step: Step, began: float, first: int) -> str:
    """``12000 events/s``, of what is read."""
    seconds = time.monotonic() - began
    if step.what != "reading" or seconds <= 0:
        return ""
    rate = (step.done - first) / seconds
    left = f", {(step.of - step.done) / rate:.0f} s left" if rate else ""
    return f"{rate:.0f} events/s{left}"
