"""The servers protocol and client are proved on: the simulator as two versions, and a real one if there is.

FORGE_TEST_COMFYUI_URL=http://host:8188 adds the real ComfyUI. It needs no model. The tests clear its queue
and history, interrupt what runs and leave small files behind: give it a server nobody else uses. With these,
more is tried on it:

FORGE_TEST_COMFYUI_RESTART: a shell command that kills it the hard way and starts it again.
FORGE_TEST_COMFYUI_CHECKPOINT: the name of an SD1.5-type checkpoint it has; random weights will do.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from comfyui.conformance.comfy_server import Server
from forge.comfyui.simulator import Simulator, SimulatorOptions

REAL_URL = os.environ.get("FORGE_TEST_COMFYUI_URL")
TARGETS = ["0.27.0", "0.3.64", *(["real"] if REAL_URL else [])]


@pytest.fixture(scope="session", params=TARGETS)
async def running_server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    if request.param == "real":
        assert REAL_URL is not None
        async with aiohttp.ClientSession(REAL_URL) as session:
            async with session.get("/system_stats") as answer:
                version = (await answer.json())["system"]["comfyui_version"]
            yield Server(session, REAL_URL, version, simulated=False)
        return
    async with (
        Simulator(SimulatorOptions(version=request.param)) as simulator,
        aiohttp.ClientSession(simulator.url) as session,
    ):
        yield Server(session, simulator.url, request.param, simulated=True)


@pytest.fixture
async def server(running_server: Server) -> AsyncIterator[Server]:
    """A server at rest."""
    await running_server.settle()
    yield running_server
    await running_server.settle()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address that refuses connections, and that nobody else can get meanwhile."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def space() -> str:
    """A folder below output/ that nobody else writes to."""
    return f"conformance/{os.urandom(6).hex()}"
