"""A small file system of a test's own, which becomes really full."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_volume(where: Path, size: str) -> Iterator[Path]:
    """A tmpfs of `size` (as mount has it: `8m`) on the folder `where`.

    Skips, and says so, where mounting is not allowed; tests with a limit on a real volume run anywhere.
    """
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "forge-test", str(where)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no really full volume here, mounting is not allowed: {mounted.stderr.strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)
