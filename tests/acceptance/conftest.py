"""Where the systems of acceptance tests live: Postgres wants short paths that anybody may enter."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def _rooms(open_directory: Path) -> Path:
    folder = open_directory / "acceptance"
    folder.mkdir(mode=0o755)
    return folder


@pytest.fixture(scope="module")
def module_root(_rooms: Path) -> Iterator[Path]:
    """A directory for a system that the tests of a module share."""
    folder = _room(_rooms)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def root(_rooms: Path) -> Iterator[Path]:
    """A directory for a system of the test's own."""
    folder = _room(_rooms)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _room(rooms: Path) -> Path:
    folder = rooms / str(next(_numbers))
    folder.mkdir(mode=0o755)
    return folder
