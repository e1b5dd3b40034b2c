"""Jobs by hand."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from forge.cli.lists import clock, columns, listed, show_told, some, span
from forge.cli.moments import Moment
from forge.cli.options import data_dir_option, system_settings

if TYPE_CHECKING:
    from forge.api.schemas import JobView

STATUSES = ("pending", "running", "completed", "failed", "cancelled")

_WIDTHS = {
    "id": 36,
    "status": 9,
    "type": 18,
    "user": 16,
    "prio": 4,
    "tries": 5,
    "created": 19,
    "took": 8,
    "": 0,
}


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--status", "statuses", multiple=True, type=click.Choice(STATUSES), help="Repeatable [any].")
@click.option("--type", "job_type", help="Only jobs of this type.")
@click.option("--user", help="Only this user's.")
@click.option("--character", help="Only for this character.")
@click.option("--session", help="Only of this session.")
@click.option("--batch", type=click.UUID, help="Only of this batch.")
@click.option("--since", metavar="TIME", type=Moment(), help="Only asked for since then, like '2h ago'.")
@click.option("--until", metavar="TIME", type=Moment(), help="Only asked for before then.")
@some
@data_dir_option
def jobs(
    context: click.Context,
    statuses: tuple[str, ...],
    job_type: str | None,
    user: str | None,
    character: str | None,
    session: str | None,
    batch: UUID | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    every: bool,
    as_json: bool,
    data_dir: Path | None,
) -> None:
    """List jobs, newest first, as the tables have them now; `forge jobs show ID` tells all of one.

    Needs Postgres, not the API. Lines come as they are read, however many there are. With --json each is a
    job as the API says it.

    \b
    forge jobs --status failed --since '1d ago'
    forge jobs --user mei --json --all | jq -r 'select(.cached) | .id'

    Exit status: 0 listed, also where there are none; 2 a server does not answer, or wrong usage.
    """
    if context.invoked_subcommand is not None:
        context.obj = data_dir
        return
    from forge import listing
    from forge.domain.jobs import Status
    from forge.projections.queue import Wanted

    wanted = Wanted(
        statuses=tuple(map(Status, statuses or STATUSES)),
        job_type=job_type,
        session_id=session,
        character_id=character,
        batch_id=batch,
        created_after=since,
        created_before=until,
    )
    most = None if every else limit
    found = listing.jobs(system_settings(data_dir), user, wanted, most)
    listed(found, most, "jobs", None if as_json else columns(_WIDTHS, _row))


@jobs.command("show")
@click.argument("job_id", metavar="ID", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: the job and its history.")
@data_dir_option
@click.pass_obj
def show_job(outer: Path | None, job_id: UUID, as_json: bool, data_dir: Path | None) -> None:
    """Show a job and everything that happened to it, from the log.

    ID is the job's, as lists and answers have it.
    """
    from forge import listing

    show_told(listing.job(system_settings(data_dir or outer), job_id), as_json)


def _row(job: JobView) -> tuple[Any, ...]:
    began = job.started_at or job.created_at
    took = span(began, job.completed_at) if job.completed_at else ""
    note = job.error.code if job.error else "cached" if job.cached else ""
    described = (job.job_type, job.user_id, job.priority, job.attempts)
    return (job.id, job.status, *described, clock(job.created_at), took, note)
