"""A whole API on real servers: NATS, Postgres, projector, the asset volume, and uvicorn on a free port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from typing import Any

import httpx
import pytest
from nats.aio.client import Client

from api.serving import Serve, Served, listening, parts_over
from forge import admissions, database, provenance, topology, uploads
from forge.api import assets, checkpoint, fresh, jobs, keys, limits, operations, reads, tickets
from forge.broker import connect
from forge.projections import reading
from forge.settings import Settings
from forge.workers import projector


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """forge waits for its servers as long as a machine may stall on which much else runs: a disk that takes
    a second for a write is not what these tests are about. Those that are set the limit they mean."""
    for module in (admissions, assets, jobs, keys, limits, provenance):
        monkeypatch.setattr(module, "SUBMIT_SECONDS", 10.0)
    for module, name in (
        (uploads, "_CLIENT_SECONDS"),
        (assets, "_REPORT_SECONDS"),
        (reads, "_WRITE_SECONDS"),
        (tickets, "_ASK_SECONDS"),
        (reading, "SECONDS"),
        (fresh, "_MISSING_SECONDS"),
        (fresh, "_CHANGED_SECONDS"),
        (operations, "_CHECK_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 10.0)
    monkeypatch.setattr(checkpoint, "WAIT_SECONDS", 15.0)


@pytest.fixture
async def nats_client(nats_server: Any) -> AsyncIterator[Client]:
    nc = await connect(nats_server.url, "test")
    await topology.apply(nc)
    yield nc
    with suppress(OSError):  # the test may have left its server dead
        await nc.close()


@pytest.fixture
async def serve(nats_client: Client, settings: Settings) -> AsyncIterator[Serve]:
    """Start an API over this test's servers; `projecting=False` leaves the tables behind."""
    async with AsyncExitStack() as stack:

        async def start(
            *, projecting: bool = True, open_to_loopback: bool = True, with_settings: Settings = settings
        ) -> Served:
            pool = await stack.enter_async_context(database.opened(with_settings.postgres_dsn))
            parts = await parts_over(stack, nats_client, pool, with_settings, open_to_loopback)
            stack.push_async_callback(_ended, asyncio.create_task(parts.live.run()))
            if projecting:
                stack.push_async_callback(_ended, asyncio.create_task(projector.run(nats_client, pool)))
            await asyncio.wait_for(parts.admissions.caught_up.wait(), 30)
            base_url, gate = await stack.enter_async_context(listening(parts))
            return Served(parts, base_url, gate)

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    return await serve()


@pytest.fixture
async def mei(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A player's requests."""
    async with served.client("mei") as client:
        yield client


@pytest.fixture
async def lan(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """Another player's requests."""
    async with served.client("lan") as client:
        yield client


@pytest.fixture
async def operator(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """An operator's requests."""
    async with served.client() as client:
        yield client


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
