"""The command line. Each command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import errno
import os
import sys

import click

from forge.cli.assets import assets
from forge.cli.asyncapi import asyncapi
from forge.cli.at import at
from forge.cli.bench import bench
from forge.cli.cleanup import cleanup
from forge.cli.completion import completion
from forge.cli.doctor import doctor
from forge.cli.jobs import jobs
from forge.cli.keys import keys
from forge.cli.log import log
from forge.cli.replay import replay
from forge.cli.settings import settings
from forge.cli.sim import sim
from forge.cli.subscribers import subscribers
from forge.cli.systems import api, demo, dev, setup, worker
from forge.cli.top import top
from forge.cli.whatif import whatif
from forge.errors import ForgeError

REFUSED = 2

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main() -> None:
    """Run a command; what forge refuses, or has no room for, is told on stderr, with exit status 2."""
    try:
        cli(prog_name="forge")
    except ForgeError as error:
        _refused(error.detail)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        # what is left is not tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _refused(f"what this was written to is full: {error}")


def _refused(why: str) -> None:
    click.echo(f"forge: {why}", err=True)
    sys.exit(REFUSED)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="forge")
def cli() -> None:
    """Pictures for a game, made by ComfyUI: queued fairly, never lost, stored once.

    \b
    Try it:           forge demo
    Develop with it:  forge dev
    Run it for real:  forge setup, then forge api and forge worker beside
                      your own NATS, Postgres and ComfyUI (forge settings)
    """


for command in (
    *(demo, dev, setup, api, worker, sim),
    *(doctor, top, jobs, assets, keys, subscribers, settings, cleanup, replay),
    *(at, whatif, bench, asyncapi, completion),
    log,
):
    cli.add_command(command)
