"""What a worker with a port says about itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from forge.errors import LogUnavailable, ServerFailed
from forge.workers.status import Status


@pytest.fixture
async def status() -> Status:
    return Status(asyncio.Event())


@pytest.fixture
async def asker(status: Status) -> AsyncIterator[httpx.AsyncClient]:
    async with status.serving("127.0.0.1", 0) as port, httpx.AsyncClient() as client:
        client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        yield client


async def fine() -> int:
    return 7


async def gone() -> None:
    raise LogUnavailable("NATS gave no answer")


async def hanging() -> None:
    await asyncio.Event().wait()


async def test_it_is_ready_from_when_it_works_until_it_is_to_stop(
    status: Status, asker: httpx.AsyncClient
) -> None:
    status.checks["log"] = fine
    assert (await asker.get("/readyz")).status_code == 503
    assert (await asker.get("/livez")).text == "ok\n"
    status.working = True
    ready = await asker.get("/readyz")
    assert (ready.status_code, ready.json()) == (
        200,
        {"ready": True, "checks": {"log": {"ok": True, "detail": ""}}},
    )
    status.stop.set()
    assert (await asker.get("/readyz")).status_code == 503


async def test_what_does_not_answer_is_named(status: Status, asker: httpx.AsyncClient) -> None:
    status.working = True
    status.checks |= {"log": gone, "database": hanging, "else": fine}
    answer = await asker.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["checks"] == {
        "log": {"ok": False, "detail": "NATS gave no answer"},
        "database": {"ok": False, "detail": "no answer in time"},
        "else": {"ok": True, "detail": ""},
    }


async def test_a_taken_port_is_refused_with_the_variable(asker: httpx.AsyncClient) -> None:
    port = asker.base_url.port
    assert port is not None
    with pytest.raises(ServerFailed, match=f"FORGE_WORKER_PORT={port}"):
        async with Status(asyncio.Event()).serving("127.0.0.1", port):
            pass
