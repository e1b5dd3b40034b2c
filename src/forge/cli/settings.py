"""What forge is set to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge.cli.options import data_dir_option, environment, given_settings

if TYPE_CHECKING:
    from forge.settings import Settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each, a line each.")
@data_dir_option
def settings(as_json: bool, data_dir: Path | None) -> None:
    """List every setting: variable, value, unit, meaning. Secrets are not shown."""
    import msgspec

    rows = list(_rows(environment(data_dir), given_settings(data_dir)))
    if as_json:
        for row in rows:
            click.echo(msgspec.json.encode(row).decode())
        return
    click.echo(
        "Settings are read from the environment once, at start; VARIABLE_FILE names a file with a secret.\n"
    )
    for row in rows:
        unit = f" {row['unit']}" if row["unit"] and row["value"] else ""
        source = "  (default)" if row["default"] else ""
        click.echo(f"{row['variable']}={row['value']}{unit}{source}\n    {row['meaning']}")
    click.echo("OTEL_*\n    tracing and metrics, as OpenTelemetry defines them")


def _rows(environ: Mapping[str, str], current: Settings) -> Iterator[dict[str, Any]]:
    from forge.settings import describe

    for name, about in describe().items():
        given = bool(environ.get(about.variable, "").strip())
        yield {
            "variable": about.variable,
            "value": "(hidden)" if about.secret and given else _shown(getattr(current, name)),
            "unit": about.unit,
            "default": not given,
            "meaning": about.meaning,
        }


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={one}" for name, one in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
