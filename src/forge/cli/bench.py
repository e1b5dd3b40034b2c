"""The benchmarks as a command. They belong to the checkout, not to the package, and run as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

_ROOT = Path(__file__).resolve().parents[3]


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def bench(words: tuple[str, ...]) -> None:
    """Run the benchmarks: [NAME…] [--short] [--rounds N] [--json FILE] [--dir DIR].

    One table of what was reached beside what is wanted, each figure with its yardstick from the same run. It
    needs the folder benchmarks/ of the source.
    """
    if not (_ROOT / "benchmarks" / "__main__.py").is_file():
        raise click.ClickException(
            "the benchmarks are in forge's source, not in the installed package: run ./forge bench there"
        )
    path = os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if part)
    command = [sys.executable, "-m", "benchmarks", *words]
    sys.exit(subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode)
