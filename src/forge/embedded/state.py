"""A state directory has one owner at a time, and a new owner clears what the last one left running."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from pathlib import Path

import psutil

from forge.errors import ServerFailed


class DirectoryLock:
    """The right to run a server on one directory; the kernel takes it back when its holder dies."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take it.

        Raises:
            ServerFailed: another process, or another server object here, holds it.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise ServerFailed(
                f"{self.path.parent} is in use by process {holder or 'unknown'}: "
                "stop that one or choose another directory"
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it back; harmless when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @staticmethod
    def is_held(directory: Path) -> bool:
        """Whether some living process holds the lock of `directory`."""
        try:
            descriptor = os.open(directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False


def clear_leftovers(directory: Path, name: str, polite: signal.Signals, patience: float = 30.0) -> int:
    """End every process whose name starts with `name` and that works in `directory`; returns how many.

    Call it with the directory's lock held: whoever works there then has lost its owner. Recorded process
    numbers would not do, they are recycled.
    """
    found: set[int] = set()
    deadline = time.monotonic() + patience
    while orphans := _working_in(directory, name):
        late = time.monotonic() > deadline
        for orphan in orphans:
            if late or orphan.pid not in found:
                found.add(orphan.pid)
                _signal(orphan, signal.SIGKILL if late else polite)
        psutil.wait_procs(orphans, timeout=0.2)
    return len(found)


def _working_in(directory: Path, name: str) -> list[psutil.Process]:
    place = str(directory.resolve())
    return [
        process
        for process in psutil.process_iter(["name", "cwd"])
        if process.info["cwd"] == place and (process.info["name"] or "").startswith(name)
    ]


def _signal(process: psutil.Process, what: signal.Signals) -> None:
    try:
        process.send_signal(what)
    except psutil.NoSuchProcess:
        return
