"""Watching a running forge in the terminal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge.cli.options import data_dir_option, system_settings

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from forge.settings import Settings
    from forge.watching import Frame, Room, Running, Waiting, Watch

_LEVELS = (("green", ""), ("yellow", "warning"), ("yellow", "cleaning up"), ("red", "full"))
_NAMES_SHOWN = 6
_ROOMY = 120
_ELASTIC = frozenset(("user", "type"))


@click.command()
@data_dir_option
@click.option("--interval", type=click.FloatRange(0.2, 60), default=1.0, show_default=True, help="Seconds.")
@click.option("--once", is_flag=True, help="Print one frame and leave; also where there is no terminal.")
@click.option("--json", "as_json", is_flag=True, help="Each frame as one JSON object on a line.")
def top(data_dir: Path | None, interval: float, once: bool, as_json: bool) -> None:
    """Show slots, running jobs, queue, back ends, disk and lag as they change; q or Ctrl-C leaves.

    It asks log, database and volume, not the API, and costs them little. A server that does not answer is
    named in the frame.

    Exit status: 0; with --once 1 where something did not answer.
    """
    settings = system_settings(data_dir)
    once = once or not (as_json or sys.stdout.isatty())
    with _interruptible():
        sys.exit(asyncio.run(_shown(settings, interval, once, as_json)))


async def _shown(settings: Settings, interval: float, once: bool, as_json: bool) -> int:
    import logging

    import msgspec
    from rich.console import Console
    from rich.live import Live

    from forge.watching import watching

    logging.getLogger("forge").addHandler(logging.NullHandler())  # frames tell what is missing
    console = Console()
    async with watching(settings) as watch:
        if once or as_json:
            async for frame in _frames(watch, interval, once, asyncio.Event()):
                if as_json:
                    click.echo(msgspec.json.encode(frame).decode())
                else:
                    console.print(picture(frame, console.width))
            return 1 if frame.missing else 0
        async with _leaving("q") as left:
            with Live(console=console, screen=True, auto_refresh=False) as live:
                async for frame in _frames(watch, interval, False, left):
                    live.update(picture(frame, console.width), refresh=True)
    return 0


async def _frames(watch: Watch, interval: float, once: bool, left: asyncio.Event) -> AsyncIterator[Frame]:
    """One after the other until ``left`` is set; at least one."""
    while True:
        yield await watch.frame()
        if once:
            return
        try:
            async with asyncio.timeout(interval):
                await left.wait()
            return
        except TimeoutError:
            continue


# ------------------------------------------------------------------ a picture


def picture(frame: Frame, width: int) -> RenderableType:
    """A frame for a terminal of so many columns."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_headline(frame)]
    parts += [Text(f"! {what}", style="red") for what in frame.missing]
    if frame.disk is not None:
        parts.append(_disk(frame.disk))
    parts.append(_backends(frame))
    if frame.running is not None:
        parts += [Text(f"\n{len(frame.running)} running", style="bold"), _running(frame.running, width)]
    if frame.waiting is not None:
        parts += [Text(_queue(frame.waiting), style="bold"), _waiting(frame.waiting)]
    return Group(*parts)


def _headline(frame: Frame) -> RenderableType:
    from rich.text import Text

    line = Text(f"forge  {frame.at.astimezone():%F %T}", style="bold")
    if frame.places is not None and frame.orders is not None:
        slots = "█" * frame.orders + "░" * max(0, frame.places - frame.orders)
        line.append(f"   slots {slots} {frame.orders}/{frame.places}")
    for stream, behind in (frame.lag or {}).items():
        if behind:
            line.append(f"   {stream}: tables {behind} behind", style="yellow")
    if frame.hour is not None:
        ended = ", ".join(f"{n} {outcome}" for outcome, n in sorted(frame.hour.items()))
        line.append(f"\nthis hour: {ended or 'nothing'}", style="not bold")
    if frame.per_minute is not None:
        line.append(f"   {frame.per_minute:.1f} jobs end a minute", style="not bold")
    return line


def _disk(room: Room) -> RenderableType:
    from rich.text import Text

    style, said = _LEVELS[room.level]
    part = room.used / room.limit if room.limit else 1.0
    used = f"{room.used / 1e9:.2f} of {room.limit / 1e9:.2f} GB, {room.free / 1e9:.2f} GB free"
    return Text.assemble("disk  ", (_bar(part, 30), style), f" {part:.0%}  {used} ", (said, style))


def _backends(frame: Frame) -> RenderableType:
    from rich.text import Text

    if frame.backends is None:
        return Text("ComfyUI: no worker tells how it stands", style="yellow")
    lines = Text()
    for nth, backend in enumerate(frame.backends):
        state, style = ("usable", "green") if backend.healthy else (backend.reason, "red")
        rank = "preferred" if backend.preferred else "fallback"
        line = Text.assemble(f"{rank:9} {backend.url}  ", (_plain(state), style))
        if backend.queue_remaining is not None:
            line.append(f"  {backend.queue_remaining} prompts")
        lines.append("\n" if nth else "").append_text(line)
    return lines


def _running(jobs: list[Running], width: int) -> Table:
    """Ids stay whole, to be copied: where there is no room for all, bars and addresses go first."""
    roomy = width >= _ROOMY
    table = _table("job", "user", "type", "try", "seconds", "progress", *(["at"] if roomy else []))
    for job in jobs:
        done = "" if job.progress is None else f"{job.progress:.0%}"
        if done and roomy:
            done = f"{_bar(job.progress or 0.0, 12)} {done}"
        tries, seconds = str(job.attempt), f"{job.seconds:.1f}"
        cells = (str(job.id), job.user_id, job.job_type, tries, seconds, done)
        _row(table, *cells, *([job.backend or ""] if roomy else []))
    return table


def _queue(waiting: Waiting) -> str:
    said = f"{waiting.jobs} waiting"
    if waiting.jobs:
        said += f", the oldest for {waiting.oldest:.0f} s, {waiting.backing_off} in back-off"
    return said


def _waiting(waiting: Waiting) -> Table:
    table = _table("by user", "by type")
    users, types = _most(waiting.by_user), _most(waiting.by_type)
    for nth in range(max(len(users), len(types))):
        _row(table, *(names[nth] if nth < len(names) else "" for names in (users, types)))
    return table


def _most(counts: Mapping[str, int]) -> list[str]:
    lines = [f"{count:>5} {name}" for name, count in list(counts.items())[:_NAMES_SHOWN]]
    left = len(counts) - _NAMES_SHOWN
    return [*lines, f"      and {left} more"] if left > 0 else lines


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, no_wrap=column not in _ELASTIC)
    return table


def _row(table: Table, *cells: str) -> None:
    from rich.text import Text

    table.add_row(*(Text(_plain(cell), no_wrap=True, overflow="ellipsis") for cell in cells))


def _bar(part: float, width: int) -> str:
    full = round(min(1.0, max(0.0, part)) * width)
    return "━" * full + "╌" * (width - full)


def _plain(text: str) -> str:
    return "".join(sign if sign.isprintable() else "�" for sign in text)


# ------------------------------------------------------------------- leaving


@asynccontextmanager
async def _leaving(key: str) -> AsyncIterator[asyncio.Event]:
    """An event that is set by the key, where there is a keyboard, and by Ctrl-C: what is being asked for is
    awaited, since before Python 3.12 nats-py can lose a cancellation."""
    import signal
    import termios
    import tty

    left, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, left.set)
    if not sys.stdin.isatty():
        yield left
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def read() -> None:
        if key in sys.stdin.read(1).lower():
            left.set()

    tty.setcbreak(keyboard)
    loop.add_reader(keyboard, read)
    try:
        yield left
    finally:
        loop.remove_reader(keyboard)
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a way to leave, not a failure."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(0)
