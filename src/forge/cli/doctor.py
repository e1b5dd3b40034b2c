"""Looking for what is wrong."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge.cli.options import data_dir_option, dev_url, environment

if TYPE_CHECKING:
    from forge.doctor import Finding

_STYLES = {"ok": "green", "skipped": "dim", "warning": "yellow", "failure": "red"}


@click.command()
@data_dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each finding, a line each.")
def doctor(data_dir: Path | None, as_json: bool) -> None:
    """Say what is wrong, and the command or act that mends it.

    Settings, NATS, streams, log, Postgres, tables, clocks, volume, disk, leftovers, ComfyUI, the roles of
    workers, the API, keys and memory are looked at side by side, in ten seconds at most. Nothing is changed,
    and any of the servers may be down. What lies behind a server that is down is skipped.

    Exit status: 0 nothing to mend, 1 something is (a warning or a failure), 2 wrong usage.
    """
    from forge.doctor import Level, run

    findings = run(environment(data_dir), dev_url(data_dir))
    if as_json:
        import msgspec

        for finding in findings:
            click.echo(msgspec.json.encode(finding).decode())
    else:
        _show(findings)
    sys.exit(any(finding.level in (Level.WARNING, Level.FAILURE) for finding in findings))


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    for finding in findings:
        line = Text.assemble(
            (f"{finding.level:8}", _STYLES[finding.level]), f"{finding.check:12}", finding.found
        )
        console.print(line)
        if finding.remedy:
            console.print(Text(f"{'':8}{'':12}→ {finding.remedy}"))
