"""Cleaning up by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from forge.cli.options import data_dir_option, system_settings


@click.command()
@data_dir_option
@click.option("--dry-run", is_flag=True, help="Show what would go; nothing does.")
@click.option("--yes", is_flag=True, help="Also when it is so much that it waits for an operator.")
@click.option("--json", "as_json", is_flag=True, help="Say it as one JSON object.")
@click.option(
    "--reason",
    "reasons",
    multiple=True,
    type=click.Choice(["expired", "old", "evicted", "lost", "damaged", "orphaned", "temporary"]),
    help="Only for this reason; repeatable [all but evicted; old only with --older-than].",
)
@click.option("--older-than", type=click.IntRange(0), metavar="SECONDS", help="Only what is older than that.")
@click.option("--asset-type", help="Only assets of this type.")
def cleanup(
    data_dir: Path | None,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    reasons: tuple[str, ...],
    older_than: int | None,
    asset_type: str | None,
) -> None:
    """Let go what has expired or does not belong together: rows without file, files without row.

    Needs log, database and asset volume, not the API. Only what is shown goes, pinned assets never.
    Over 1000 files or a fifth of the library waits for --yes (exit status 1 without). Files of deleted assets
    follow after their grace, by a worker with the role cleanup.
    """
    from forge.cleaning import Asked, clean

    if "old" in reasons and older_than is None:
        raise click.UsageError("--reason old needs --older-than")
    asked = Asked(reasons=reasons, older_than=older_than, asset_type=asset_type, dry_run=dry_run, yes=yes)
    sys.exit(clean(system_settings(data_dir), asked, as_json=as_json))
