"""Real servers for every test: one Postgres a run with a database a test, one nats-server a test."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as searching
from nats.aio.client import Client

from forge import database, topology
from forge.broker import connect
from forge.database import Pool
from forge.embedded import EmbeddedNats, EmbeddedPostgres
from forge.eventstore import EventStore
from forge.settings import Settings
from waiting import wait_until

TEMPLATE = "forge_template"

# How long an example takes says more about what else the machine does than about forge.
searching.register_profile("forge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
searching.load_profile("forge")


@pytest.fixture(scope="session")
def open_directory() -> Iterator[Path]:
    """A directory that every account may enter; pytest's own are closed, and too long for sockets."""
    path = Path(tempfile.mkdtemp(prefix="forge-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(open_directory: Path) -> Iterator[EmbeddedPostgres]:
    """The run's Postgres, fast and forgetful; ask for `database_dsn` unless the server itself matters."""
    server = EmbeddedPostgres(open_directory / "postgres", throwaway=True)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
async def migrated_template(postgres_server: EmbeddedPostgres) -> str:
    """The name of a database that every migration was applied to; nobody stays connected to it."""
    from forge import database

    await _execute(postgres_server, f"create database {TEMPLATE}")
    await database.migrate(postgres_server.dsn(TEMPLATE))
    return TEMPLATE


_numbers = itertools.count(1)


@pytest.fixture
async def database_dsn(postgres_server: EmbeddedPostgres, migrated_template: str) -> AsyncIterator[str]:
    """A fresh, migrated database of the test's own."""
    name = f"test_{next(_numbers)}"
    await _once_left(postgres_server, f"create database {name} template {migrated_template}")
    yield postgres_server.dsn(name)
    await _once_left(postgres_server, f"drop database {name} with (force)")


@pytest.fixture
async def empty_database_dsn(postgres_server: EmbeddedPostgres) -> AsyncIterator[str]:
    """A database without any table of forge's."""
    name = f"test_{next(_numbers)}"
    await _execute(postgres_server, f"create database {name}")
    yield postgres_server.dsn(name)
    await _once_left(postgres_server, f"drop database {name} with (force)")


@pytest.fixture(scope="session")
def nats_directory(open_directory: Path) -> Iterator[Path]:
    """Where the tests' logs lie: in memory if there is room. forge's nats-server waits for the disk at every
    event, and a disk that others use, too, may take a second."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and shutil.disk_usage(memory).free > 2 * 1024**3):
        yield open_directory
        return
    path = Path(tempfile.mkdtemp(prefix="forge-test-", dir=memory))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def nats_server(nats_directory: Path) -> Iterator[EmbeddedNats]:
    """A nats-server of the test's own, empty, really configured; `kill()` and `start()` it at will.

    Who says no name there may do everything.
    """
    state = nats_directory / f"nats-{next(_numbers)}"
    server = EmbeddedNats(state, anybody=True)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(state, ignore_errors=True)


@pytest.fixture
async def nats_client(nats_server: EmbeddedNats) -> AsyncIterator[Client]:
    """A connection to the test's nats-server, where streams and consumers are set up."""
    nc = await connect(nats_server.url, "test")
    await topology.apply(nc)
    yield nc
    await nc.close()


@pytest.fixture
def events(nats_client: Client) -> EventStore:
    """The test's log."""
    return EventStore(nats_client)


@pytest.fixture
def settings(nats_server: EmbeddedNats, database_dsn: str, tmp_path: Path) -> Settings:
    """Settings that point at this test's servers and data directory; no ComfyUI behind them."""
    return Settings(
        nats_url=nats_server.url,
        postgres_dsn=database_dsn,
        comfyui_urls=("http://127.0.0.1:9",),
        data_dir=tmp_path,
        port=0,
        rate_per_hour=1000,
        memory_limit_bytes=16 * 1024**3,  # of the process that runs all the tests
    )


async def _execute(server: EmbeddedPostgres, statement: str) -> None:
    connection = await asyncpg.connect(server.dsn())
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def _once_left(server: EmbeddedPostgres, statement: str) -> None:
    """What nobody else may be connected for: a session that was ended may take its time to go."""

    async def done() -> bool:
        try:
            await _execute(server, statement)
        except asyncpg.ObjectInUseError:
            return False
        return True

    await wait_until(done, 60, statement)


@pytest.fixture
async def pool(database_dsn: str) -> AsyncIterator[Pool]:
    """Connections to the test's own database."""
    async with database.opened(database_dsn) as pool:
        yield pool
