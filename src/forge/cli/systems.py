"""Commands that run forge: all of it, or one role."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from forge.cli.options import data_dir_option, dev_environment, given_settings, report

ROLES = ("generation", "dispatcher", "projector", "cleanup", "scheduler")


def dev_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of everything that starts a whole system."""
    for option in (
        click.option("--once", is_flag=True, help="Leave as soon as it is done, instead of serving on."),
        click.option(
            "--comfyui",
            "comfyui_urls",
            metavar="URL",
            multiple=True,
            help="A ComfyUI to draw with instead of the simulator; repeat it for fallbacks, preferred first.",
        ),
        click.option(
            "--data-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help="Where everything is kept; a second start there continues [FORGE_DATA_DIR, or .forge].",
        ),
        click.option(
            "--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one [FORGE_PORT, or 8600]."
        ),
        click.option("--host", help="Address to listen on [FORGE_HOST, or 127.0.0.1]."),
    ):
        command = option(command)
    return command


@click.command()
@dev_options
def demo(once: bool, **options: Any) -> None:
    """Start everything, make a sample set, show where it is.

    NATS, Postgres and a ComfyUI simulator are embedded: nothing has to be installed. Portraits, busts, fate
    cards and icons are asked for over the HTTP API, as a game would, and checked byte for byte. It serves
    on until Ctrl-C; with --once it leaves, with exit status 0 only if every asset is stored, listed and
    readable.
    """
    from forge.demo import show

    sys.exit(show(dev_environment(**options), once=once, report=report))


@click.command()
@dev_options
def dev(once: bool, **options: Any) -> None:
    """Run the whole system in one command, for development.

    Embedded NATS, Postgres and ComfyUI simulator, API and workers, each restarted when it dies. Servers named
    by FORGE_NATS_URL, FORGE_POSTGRES_DSN and FORGE_COMFYUI_URLS are used instead of embedded ones. Prints
    `forge ready at URL` when it serves; logs are in DATA_DIR/log. Without FORGE_API_KEYS, requests from this
    machine are the operator `dev`.

    With --once it leaves as soon as everything serves: a check of the installation.
    """
    from forge.dev import Dev, serve

    async def say_ready(system: Dev) -> int | None:
        click.echo(f"forge ready at {system.url}")
        return 0 if once else None

    sys.exit(serve(dev_environment(**options), say_ready, report))


@click.command()
@data_dir_option
def setup(data_dir: Path | None) -> None:
    """Bring streams, consumers and tables to this version.

    Repeatable: what is right already stays untouched. A stream that cannot be changed into what
    nats/streams.json says is reported with the reason.
    """
    import asyncio

    from forge import bootstrap

    for line in asyncio.run(bootstrap.setup(given_settings(data_dir))):
        click.echo(line)


@click.command()
@data_dir_option
@click.option("--open-to-loopback", is_flag=True, hidden=True)
def api(data_dir: Path | None, open_to_loopback: bool) -> None:
    """Serve the REST API and the web UI on FORGE_HOST:FORGE_PORT.

    Any number may run beside each other. SIGTERM finishes open requests first; a second one ends at once.
    """
    from forge import bootstrap

    sys.exit(bootstrap.run_api(given_settings(data_dir), open_to_loopback=open_to_loopback))


def _roles(_context: click.Context, _option: click.Parameter, text: str) -> frozenset[str]:
    roles = frozenset(role.strip() for role in text.split(",") if role.strip())
    if not roles or roles - set(ROLES):
        raise click.BadParameter(f"choose from {', '.join(ROLES)}")
    return roles


@click.command()
@data_dir_option
@click.option(
    "--roles",
    default=",".join(ROLES),
    show_default=True,
    callback=_roles,
    help="What this process does, comma separated.",
)
def worker(data_dir: Path | None, roles: frozenset[str]) -> None:
    """Draw, dispatch and project.

    \b
    generation   has ComfyUI draw, and stores what comes out
    dispatcher   chooses what is drawn next
    projector    keeps the tables and the second copy up to date with the log
    cleanup      removes what has expired
    scheduler    samples resources and starts what is due

    Any number of processes may run any roles; never more than three prompts are at ComfyUI. SIGTERM stops
    taking work and leaves running prompts for another worker to adopt; a second one ends at once.
    """
    from forge import bootstrap

    sys.exit(bootstrap.run_worker(given_settings(data_dir), roles))
