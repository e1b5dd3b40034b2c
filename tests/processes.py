"""Processes: which still live, and one that stands still."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from waiting import wait_until


def alive(pid: int) -> bool:
    """Whether a process is there and not merely unburied: nobody says when init gets to the orphans."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def freeze(pid: int) -> None:
    """Stop a process, and return when it has: until the signal has reached them all, its threads go on."""
    os.kill(pid, signal.SIGSTOP)
    await wait_until(lambda: _stands_still(pid), what=f"{pid} stands still")


def _stands_still(pid: int) -> bool:
    threads = list(Path(f"/proc/{pid}/task").glob("*/stat"))
    if not threads:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in threads)
