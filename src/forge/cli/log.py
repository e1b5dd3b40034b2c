"""The log and its second copy: compare, write into a file, give back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge.cli.at import reading
from forge.cli.moments import Moment
from forge.cli.options import data_dir_option, environment

if TYPE_CHECKING:
    from nats.aio.client import Client

    from forge.database import Connection, Pool
    from forge.settings import Settings


@click.group()
def log() -> None:
    """Check the event log, copy it, and give it back from its copy.

    forge keeps a second copy of the log in Postgres, chained by hashes. Where a `forge dev` does not run, its
    servers are started for the command.
    """


@log.command()
@data_dir_option
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False, exists=True))
def verify(data_dir: Path | None, file: Path | None) -> None:
    """Read every event of the log and of its copy, and compare them; or check a FILE alone.

    May run while forge does. The first difference is told, with exit status 2.
    """
    if file is not None:
        from forge import logfile

        with reading() as progress:
            end, _ = logfile.check(file, progress=progress)
        click.echo(f"{file} is whole: {end.seq} events, chain {end.hash.hex()}")
        return
    from forge import logbook
    from forge.eventstore import EventStore

    async def work(settings: Settings) -> logbook.Verified:
        async with _connections(settings) as (nc, connection):
            with reading() as progress:
                return await logbook.verify(EventStore(nc), connection, progress)

    with _servers(data_dir) as settings:
        found = asyncio.run(work(settings))
    click.echo(
        f"the log is whole: {found.events} events, {found.copied} of them in the copy, chain {found.chain}"
    )


@log.command()
@data_dir_option
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from",
    "source",
    type=click.Choice(["copy", "log"]),
    default="copy",
    show_default=True,
    help="The second copy in Postgres and what it lacks yet, or the log alone.",
)
def export(data_dir: Path | None, file: Path, source: str) -> None:
    """Write a third copy into FILE, for keeping elsewhere: JSON lines, compressed, with the chain's end.

    May run while forge does. `forge log verify FILE` checks it without any server.
    """
    from forge import logbook
    from forge.domain.chain import Link
    from forge.eventstore import EventStore

    async def work(settings: Settings) -> Link:
        async with _connections(settings) as (nc, connection):
            with reading() as progress:
                given = connection if source == "copy" else None
                return await logbook.export(EventStore(nc), given, file, progress)

    with _servers(data_dir) as settings:
        end = asyncio.run(work(settings))
    click.echo(f"{file}: {end.seq} events, chain {end.hash.hex()}")


@log.command()
@data_dir_option
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--shorter", is_flag=True, help="Give up events that nothing has any more.")
@click.option("--reopen", is_flag=True, help="Also a whole log: what was closed is in its stream again.")
def restore(data_dir: Path | None, file: Path | None, shorter: bool, reopen: bool) -> None:
    """Write the log anew from its copy, or from FILE where Postgres is new too.

    For a log that is damaged, or a new server. Every event gets its sequence, subject, headers and data; when
    it first arrived stands in a header. What the damaged log has behind the end of the copy is saved first.
    The stream is then deleted and made anew, written, compared, and opened. Cut or killed, it is run again.
    Stop every `forge api` and `forge worker` before; it refuses while one runs, where the log is whole, and
    where it is another log.
    """
    from forge.restoring import Restored, Step
    from forge.restoring import restore as give_back
    from forge.topology import EVENTS
    from forge.workers.projector import PROJECTIONS

    async def work(settings: Settings) -> Restored:
        from forge import database

        await database.migrate(settings.postgres_dsn)
        async with _connections(settings) as (nc, connection):
            with reading() as progress:

                def step(now: Step) -> None:
                    progress(now.done, now.of)

                mine = [projection for projection in PROJECTIONS if projection.stream == EVENTS]
                return await give_back(
                    nc,
                    connection,
                    mine,
                    file,
                    shorter=shorter,
                    reopen=reopen,
                    replicas=settings.nats_replicas,
                    progress=step,
                )

    with _servers(data_dir) as settings:
        done = asyncio.run(work(settings))
    click.echo(f"the log is whole: {done.events} events, {done.written} of them written now")
    if done.saved:
        click.echo(f"{done.saved} events were only in the damaged log, and were saved")
    if done.lost:
        click.echo(f"{done.lost} events are lost; the tables are filled again at the next start")
    if not done.announced:
        click.echo("FORGE_ASSETS_READY was not there: subscribers are told everything anew")


@log.command()
@data_dir_option
@click.option("--through", type=click.IntRange(min=1), metavar="SEQ", help="The last event that may go.")
@click.option("--before", type=Moment(), metavar="TIME", help="Or: whatever arrived before this moment.")
@click.option("--yes", is_flag=True, help="Do it; without, it is only said what would be done.")
def close(data_dir: Path | None, through: int | None, before: datetime | None, yes: bool) -> None:
    """Close the book: events leave the log's stream and live on in the second copy.

    NATS then needs less disk and memory. Nothing else changes, but that forge needs Postgres to start, and
    for whatever is about closed events. Every event of the log is compared with the copy before. Stop every
    `forge api` and `forge worker`, when no job that old is open. First copy the log elsewhere, with
    `forge log export`: afterwards Postgres alone has what is closed. May be run again if it is cut.
    """
    from forge.closing import Closing, Wanted, look
    from forge.closing import close as let_go
    from forge.topology import EVENTS
    from forge.workers.projector import PROJECTIONS

    if (through is None) == (before is None):
        raise click.UsageError("say either --through SEQ or --before TIME")

    async def work(settings: Settings) -> Closing:
        from forge import database

        await database.migrate(settings.postgres_dsn)
        async with _pools(settings) as (nc, pool), database.answering():
            mine = [projection for projection in PROJECTIONS if projection.stream == EVENTS]
            with reading() as progress:
                plan = await look(nc, pool, mine, Wanted(through, before), progress)
            if yes:
                await let_go(nc, pool, plan)
            return plan

    with _servers(data_dir) as settings:
        plan = asyncio.run(work(settings))
    count = plan.through - plan.first + 1
    if yes:
        click.echo(f"closed: {count} events left the stream, which begins at event {plan.through + 1} now")
    else:
        click.echo(
            f"{count} events, {plan.first} to {plan.through}, can leave the stream of {plan.last}: say --yes"
        )


@asynccontextmanager
async def _connections(settings: Settings) -> AsyncIterator[tuple[Client, Connection]]:
    """To the log and to the copy.

    Raises:
        LogUnavailable, DatabaseUnavailable: one of them does not answer.
    """
    from forge import database

    async with _pools(settings) as (nc, pool), database.answering(), pool.acquire() as connection:
        yield nc, connection


@asynccontextmanager
async def _pools(settings: Settings) -> AsyncIterator[tuple[Client, Pool]]:
    from forge import database
    from forge.broker import connect
    from forge.credentials import OPERATOR, login

    nc = await connect(settings.nats_url, "log", login(settings.nats_passwords_dir, OPERATOR))
    try:
        async with database.opened(settings.postgres_dsn, most=2, command_timeout=600.0) as pool:
            yield nc, pool
    finally:
        await nc.close()


@contextmanager
def _servers(data_dir: Path | None) -> Iterator[Settings]:
    """The settings; where they name no server and none runs, those of the data directory are started."""
    from forge.settings import load

    environ = environment(data_dir)
    if environ.get("FORGE_NATS_URL") or environ.get("FORGE_POSTGRES_DSN"):
        yield load(environ)
        return
    from forge.dev import servers

    with servers(environ) as settings:
        yield settings
