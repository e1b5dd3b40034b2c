"""The simulator as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from forge.cli.options import data_dir_option


def _milliseconds(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    if not least.isdigit() or not (most or least).isdigit() or int(most or least) < int(least):
        raise click.BadParameter("give one number, or two as LEAST-MOST")
    return int(least), int(most or least)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8188, show_default=True, help="0 takes a free one."
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where input, output and temp lie [a temporary directory].",
)
@click.option(
    "--render-ms",
    default="0",
    metavar="LEAST-MOST",
    callback=_milliseconds,
    help="How long a prompt takes, drawn anew for each [0].",
)
@click.option(
    "--version",
    "comfyui_version",
    type=click.Choice(["0.27.0", "0.3.64"]),
    default="0.27.0",
    show_default=True,
)
@click.option(
    "--fault", "faults", metavar="NAME[=VALUE]", multiple=True, help="A fault to start with; repeatable."
)
@click.option(
    "--record", type=click.Path(path_type=Path, dir_okay=False), help="JSON lines of all that happens."
)
@data_dir_option
def sim(
    host: str,
    port: int,
    output_dir: Path | None,
    render_ms: tuple[int, int],
    comfyui_version: Any,
    faults: tuple[str, ...],
    record: Path | None,
    data_dir: Path | None,
) -> None:
    """Run the ComfyUI simulator alone: the real protocol, drawn pictures, no model.

    It can be made to fail in every way a ComfyUI was seen to fail: with --fault, or while it runs under
    /simulator/.
    """
    from forge.comfyui import simulator

    if output_dir is None and data_dir is not None:
        output_dir = data_dir / "comfyui"
    simulator.run(
        simulator.SimulatorOptions(
            host=host,
            port=port,
            output_dir=output_dir,
            render_ms=render_ms,
            version=comfyui_version,
            record=record,
            faults=simulator.faults_from(faults),
        ),
        lambda url: click.echo(f"ComfyUI simulator ready at {url}"),
    )
