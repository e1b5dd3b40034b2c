"""Processes: which still live, and one that stands still."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from itertools import chain
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
    """Stop a process and its children as a machine that swaps would, and return when they stand still: until
    the signal has reached them all, their threads go on."""
    for stopped in chain([pid], _children(pid)):  # which it cannot add to any more
        _send(stopped, signal.SIGSTOP)
        await wait_until(lambda pid=stopped: _stands_still(pid), what=f"{stopped} stands still")


def thaw(pid: int) -> None:
    """Let what was stopped go on."""
    for stopped in (*_children(pid), pid):
        _send(stopped, signal.SIGCONT)


def _children(pid: int) -> Iterator[int]:
    with contextlib.suppress(psutil.NoSuchProcess):
        yield from (child.pid for child in psutil.Process(pid).children(recursive=True))


def _send(pid: int, what: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, what)


def _stands_still(pid: int) -> bool:
    """Whether none of its threads runs; who has ended in the meantime stands stillest."""
    try:
        threads = [stat.read_text() for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
        if not threads:
            return bool(psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE))
    except psutil.NoSuchProcess:
        return True
    except OSError:  # a thread ended while it was looked at
        return False
    return all(stat.rpartition(")")[2].split()[0] in "TZ" for stat in threads)
