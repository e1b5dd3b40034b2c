"""API keys by hand."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from forge.cli.options import actor, data_dir_option, report, system_settings
from forge.domain.keys import ROLES

if TYPE_CHECKING:
    from forge.keys import Keys

T = TypeVar("T")


@click.group()
def keys() -> None:
    """Create, list and revoke API keys.

    Keys are events of the log: every API knows a new one, and refuses a revoked one, within moments. These
    commands talk to NATS alone. Keys of FORGE_API_KEYS are not among them.
    """


@keys.command("create")
@click.option("--role", type=click.Choice(ROLES), required=True, help="What it may do.")
@click.option("--user", required=True, help="Whom it speaks for: a player, a service or an operator.")
@click.option("--label", help="What it is for, in words.")
@data_dir_option
def create_key(role: str, user: str, label: str | None, data_dir: Path | None) -> None:
    """Create a key and print it: this once, for only its SHA-256 is kept.

    \b
    player    jobs and assets of its own
    service   acts for any player, named by X-Forge-User
    operator  everything
    """
    text, record = _on_the_log(
        data_dir, lambda keys: keys.create(role=role, user=user, label=label, actor=actor())
    )
    click.echo(text)
    report(f"this is key {record.meta.correlation}; it is not shown again")


@keys.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each key, a line each.")
@data_dir_option
def list_keys(as_json: bool, data_dir: Path | None) -> None:
    """List every key there ever was, oldest first."""
    import msgspec

    for key in _on_the_log(data_dir, lambda keys: keys.all()):
        told = {name: value for name, value in msgspec.structs.asdict(key).items() if name != "digest"}
        if as_json:
            click.echo(msgspec.json.encode(told).decode())
            continue
        state = f"revoked {key.revoked_at:%Y-%m-%d %H:%M} by {key.revoked_by}" if key.revoked_at else "good"
        made = f"created {key.created_at:%Y-%m-%d %H:%M} by {key.created_by}"
        click.echo("  ".join([key.id, f"{key.role}:{key.user_id}", key.label or "-", made, state]))


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@data_dir_option
def revoke_key(key_id: str, data_dir: Path | None) -> None:
    """Revoke a key for ever; saying it again does no harm."""
    _on_the_log(data_dir, lambda keys: keys.revoke(key_id, actor=actor()))
    report(f"key {key_id} is revoked")


def _on_the_log(data_dir: Path | None, act: Callable[[Keys], Awaitable[T]]) -> T:
    """Do one thing with the keys of the log."""
    import asyncio

    from forge import bootstrap

    async def done() -> T:
        async with bootstrap.keys(system_settings(data_dir)) as keys:
            return await act(keys)

    return asyncio.run(done())
