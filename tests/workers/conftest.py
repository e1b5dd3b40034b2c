"""A forge that draws, one for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client

from acceptance.job_types import write_swatch
from forge.comfyui.workflows import Workflow, load
from forge.embedded import EmbeddedNats
from workers.works import Works, working


@pytest.fixture(scope="session")
def job_types(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Workflow]:
    return load(write_swatch(tmp_path_factory.mktemp("types") / "own"))


@pytest.fixture
async def works(
    nats_server: EmbeddedNats, nats_client: Client, tmp_path: Path, job_types: dict[str, Workflow]
) -> AsyncIterator[Works]:
    """One ComfyUI."""
    async with working(nats_server, nats_client, tmp_path, job_types) as works:
        works.time_out(60)
        yield works


@pytest.fixture
async def two_comfyuis(
    nats_server: EmbeddedNats, nats_client: Client, tmp_path: Path, job_types: dict[str, Workflow]
) -> AsyncIterator[Works]:
    """Two of them, the first preferred."""
    async with working(nats_server, nats_client, tmp_path, job_types, simulators=2) as works:
        works.time_out(60)
        yield works
