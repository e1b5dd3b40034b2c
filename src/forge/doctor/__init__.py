"""``forge doctor``: says what is wrong with an installation, and the command or act that mends it.

:mod:`~forge.doctor.gathering` asks servers, disk and machine, all at once and none for long, and changes
nothing. :mod:`~forge.doctor.checks` says what follows from the :mod:`~forge.doctor.facts`, without I/O and
clock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from forge.doctor.checks import judge
from forge.doctor.findings import Finding, Level
from forge.doctor.gathering import Clock, gather, utc

__all__ = ["Finding", "Level", "examine", "run"]


async def examine(
    environ: Mapping[str, str], *, dev_url: str | None = None, clock: Clock = utc
) -> list[Finding]:
    """What there is to say of the installation that these variables describe, in the order of the checks.

    Args:
        environ: as :func:`forge.settings.load` takes it.
        dev_url: where the `forge dev` that runs there serves, if one does.
        clock: this machine's.
    """
    return judge(await gather(environ, dev_url=dev_url, clock=clock))


def run(environ: Mapping[str, str], dev_url: str | None) -> list[Finding]:
    """:func:`examine`, from a command."""
    logging.getLogger("forge").addHandler(logging.NullHandler())  # what is wrong is told as findings
    return asyncio.run(examine(environ, dev_url=dev_url))
