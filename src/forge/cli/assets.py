"""Stored pictures by hand."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from forge.cli.lists import clock, columns, listed, show_told, some
from forge.cli.moments import Moment
from forge.cli.options import data_dir_option, system_settings

if TYPE_CHECKING:
    from forge.api.schemas import AssetView

ORDERS = ("-created_at", "created_at", "-file_size_bytes", "file_size_bytes")

_WIDTHS = {
    "id": 36,
    "type": 18,
    "user": 16,
    "character": 16,
    "size": 9,
    "bytes": 9,
    "reads": 5,
    "created": 19,
    "until": 19,
}


@click.group(invoke_without_command=True)
@click.pass_context
@click.option("--type", "asset_type", help="Only assets of this type.")
@click.option("--user", help="Only this user's, as this user sees them.")
@click.option("--character", help="Only of this character.")
@click.option("--session", help="Only of this session.")
@click.option("--category", help="Only of this category.")
@click.option("--archetype", help="Only of this archetype.")
@click.option("--variant", help="Only of this variant.")
@click.option("--since", metavar="TIME", type=Moment(), help="Only stored since then, like '2h ago'.")
@click.option("--until", metavar="TIME", type=Moment(), help="Only stored before then.")
@click.option("--sort", type=click.Choice(ORDERS), default="-created_at", show_default=True, help="Order.")
@some
@data_dir_option
def assets(
    context: click.Context,
    asset_type: str | None,
    user: str | None,
    character: str | None,
    session: str | None,
    category: str | None,
    archetype: str | None,
    variant: str | None,
    since: datetime | None,
    until: datetime | None,
    sort: str,
    limit: int,
    every: bool,
    as_json: bool,
    data_dir: Path | None,
) -> None:
    """List stored pictures, newest first; `forge assets show ID` tells all of one, also of one that is gone.

    Needs Postgres, not the API. Lines come as they are read, however many there are. With --json each is an
    asset as the API says it.

    \b
    forge assets --sort -file_size_bytes --limit 10
    forge assets --character mei-lin --json --all | jq -r .file_path

    Exit status: 0 listed, also where there are none; 2 a server does not answer, or wrong usage.
    """
    if context.invoked_subcommand is not None:
        context.obj = data_dir
        return
    from forge import listing
    from forge.projections.asset_lists import Wanted

    wanted = Wanted(
        asset_type=asset_type,
        category=category,
        archetype_id=archetype,
        variant_key=variant,
        character_id=character,
        session_id=session,
        created_after=since,
        created_before=until,
    )
    most = None if every else limit
    found = listing.assets(system_settings(data_dir), user, wanted, sort, most)
    listed(found, most, "assets", None if as_json else columns(_WIDTHS, _row))


@assets.command("show")
@click.argument("asset_id", metavar="ID", type=click.UUID)
@click.option("--json", "as_json", is_flag=True, help="One JSON object: the asset and its history.")
@data_dir_option
@click.pass_obj
def show_asset(outer: Path | None, asset_id: UUID, as_json: bool, data_dir: Path | None) -> None:
    """Show an asset and everything that happened to it, from the log; also when it is long gone.

    ID is the asset's, as lists and answers have it.
    """
    from forge import listing

    show_told(listing.asset(system_settings(data_dir or outer), asset_id), as_json)


def _row(asset: AssetView) -> tuple[Any, ...]:
    until = "pinned" if asset.pinned else clock(asset.expires_at) if asset.expires_at else "for ever"
    whose = (asset.id, asset.asset_type, asset.user_id, asset.character_id or "")
    what = (asset.dimensions, asset.file_size_bytes, asset.access_count)
    return (*whose, *what, clock(asset.created_at), until)
