"""What forge is set to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge.cli.options import data_dir_option, environment, given_settings


@click.command()
@data_dir_option
def settings(data_dir: Path | None) -> None:
    """List every setting: variable, value, unit, meaning. Secrets are not shown."""
    from forge.settings import describe

    environ = environment(data_dir)
    current = given_settings(data_dir)
    click.echo(
        "Settings are read from the environment once, at start; VARIABLE_FILE names a file with a secret.\n"
    )
    for name, about in describe().items():
        given = bool(environ.get(about.variable, "").strip())
        value = "(hidden)" if about.secret and given else _shown(getattr(current, name))
        unit = f" {about.unit}" if about.unit and value else ""
        source = "" if given else "  (default)"
        click.echo(f"{about.variable}={value}{unit}{source}\n    {about.meaning}")
    click.echo("OTEL_*\n    tracing and metrics, as OpenTelemetry defines them")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={one}" for name, one in value.items())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)
