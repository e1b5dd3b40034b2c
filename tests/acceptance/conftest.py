"""Where acceptance tests have their systems, and who looks on; Postgres wants short paths, open to all."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from acceptance.evidence import Witness
from acceptance.players import Crowd
from acceptance.settling import watching
from acceptance.system import System

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


@pytest.fixture(scope="module")
async def witness(system: System) -> AsyncIterator[Witness]:
    """Who sees everything that the module's own `system` does."""
    async with watching(system) as witness:
        yield witness


@pytest.fixture(scope="module")
def crowds() -> list[Crowd]:
    """Whoever asked in any test of a module: what they were told stays true."""
    return []
