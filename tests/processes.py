"""Which processes still live."""

from __future__ import annotations

import psutil


def alive(pid: int) -> bool:
    """Whether a process is there and not merely unburied: nobody says when init gets to the orphans."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
