"""The book is closed over a real system's log, and nobody who uses it notices."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from acceptance.players import granted
from acceptance.system import WORKERS, System, running
from forge import guard
from forge.broker import connect
from forge.closing import _cleaned
from forge.eventstore import EventStore
from waiting import wait_until

FORGE = ("api", *WORKERS)
ICON = {"width": 256, "height": 256}
PLACE = {"session_id": "s-1", "character_id": "c-1"}


@pytest.fixture
async def system(root: Path) -> AsyncIterator[System]:
    async with running(root, render_ms="20-60", FORGE_CLEANUP_GRACE_SECONDS="0.2") as system:
        yield system


async def ask(client: httpx.AsyncClient, key: str, seed: int, **more: Any) -> httpx.Response:
    body = {"job_type": "ui_icon", "params": {**ICON, "seed": seed}, **more}
    return await granted(client, "POST", "/jobs", json=body, headers={"Idempotency-Key": key})


async def drawn(client: httpx.AsyncClient, key: str, seed: int, **more: Any) -> dict[str, Any]:
    """A job that was asked for and is completed."""
    answer = await ask(client, key, seed, **more)
    assert answer.status_code == 202, answer.text

    async def ended() -> Any:
        told = (await client.get(f"/jobs/{answer.json()['id']}")).json()
        return told if told["status"] == "completed" else None

    return dict(await wait_until(ended, 60, f"job {key} is completed", 0.05))


async def leaves(client: httpx.AsyncClient, asset: dict[str, Any]) -> None:
    async def gone() -> bool:
        return (await client.get(f"/assets/{asset['id']}")).status_code == 404

    await wait_until(gone, 60, "the asset is gone", 0.1)


async def told(system: System, client: httpx.AsyncClient, seen: dict[str, str]) -> dict[str, Any]:
    """What anybody can look up of the past: histories, and how everything stood at an event."""
    paths = [f"/{what}/{id_}/history" for id_, what in seen.items()]
    histories = {path: (await granted(client, "GET", path)).json() for path in paths}
    views = ("queue", "limits", "inventory")
    then = {
        what: json.loads(await forge(system, "at", "seq:12", what, "--user", "mei", "--json"))
        for what in views
    }
    room = (await client.get("/limits", params=PLACE)).json()["items"]
    whatif = json.loads(await forge(system, "whatif", "--slots", "2", "--json"))
    return {**histories, **then, "limits now": [{**i, "resets_at": None} for i in room], "whatif": whatif}


@pytest.mark.timeout(300)
async def test_a_closed_book_changes_nothing(system: System) -> None:
    async with system.client("mei") as mei:
        first = await drawn(mei, "first", 1, **PLACE)
        short = await drawn(mei, "short", 2, ttl_seconds=1)
        await leaves(mei, short["assets"][0])
        through = await quiet(system)
        later = await drawn(mei, "later", 3, **PLACE)
        await quiet(system)
        old = (first, short)
        seen = {j["id"]: "jobs" for j in old} | {j["assets"][0]["id"]: "assets" for j in old}
        before = await told(system, mei, seen)
        assert "forge runs" in await forge(
            system, "log", "close", "--through", f"{through}", "--yes", status=2
        )

        await stopped(system)
        assert "say --yes" in await forge(system, "log", "close", "--through", f"{through}")
        assert "closed: " in await forge(system, "log", "close", "--through", f"{through}", "--yes")
        await started(system)
        nc = await connect(system.nats.url, "test")
        there = await guard.extent(EventStore(nc))
        await nc.close()
        assert there.first == through + 1
        assert await told(system, mei, seen) == before

        again = await ask(mei, "first", 1, **PLACE)
        assert (again.status_code, again.json()["id"]) == (202, first["id"])
        assert (await ask(mei, "first", 9, **PLACE)).status_code == 422
        assert await held(mei) == (2, await size(mei, first, later))
        assert (await granted(mei, "DELETE", f"/assets/{first['assets'][0]['id']}")).status_code == 204
        await leaves(mei, first["assets"][0])
        more = await drawn(mei, "more", 4, **PLACE)
        assert await held(mei) == (2, await size(mei, later, more))
        redrawn = await granted(mei, "POST", f"/assets/{short['assets'][0]['id']}/regenerate")
        assert redrawn.status_code == 202, redrawn.text
        await quiet(system)
        job = (await mei.get(f"/jobs/{redrawn.json()['id']}")).json()
        assert (job["status"], job["regenerates"]["result"]) == ("completed", "identical")
        assert "the same as before, byte for byte" in await forge(system, "replay", "all")
        assert "the log is whole: " in await forge(system, "log", "verify")
        for name in FORGE:
            system.kill(name)
        await started(system)
        assert (await ask(mei, "more", 4, **PLACE)).json()["id"] == more["id"]
    assert not system.deaths, system.deaths


async def held(client: httpx.AsyncClient) -> tuple[int, int]:
    """What the character and the session hold."""
    items = (await client.get("/limits", params=PLACE)).json()["items"]
    used = {item["name"]: item["used"] for item in items}
    return used["character_assets"], used["session_bytes"]


async def size(client: httpx.AsyncClient, *jobs: dict[str, Any]) -> int:
    """The bytes of these jobs' pictures."""
    pictures = [(await client.get(f"/assets/{job['assets'][0]['id']}")).json() for job in jobs]
    return sum(picture["file_size_bytes"] for picture in pictures)


async def quiet(system: System) -> int:
    """Wait until everybody has taken in the whole log; its newest event."""
    nc = await connect(system.nats.url, "test")
    connection = await asyncpg.connect(system.postgres_dsn)
    taken = """
    select min(seq) from (select max(seq) as seq from forge_log.entry
    union all select seq from projection_checkpoint where projection <> 'usage') as all_of_them
    """
    running_ = "select count(*) from generation_queue where status in ('pending', 'running')"

    async def same() -> int | None:
        head = await EventStore(nc).head()
        done = await connection.fetchval(taken) == head == await _cleaned(nc, head)
        return head if done and not await connection.fetchval(running_) else None

    try:
        head = await wait_until(same, 60, "everybody has taken in the log", 0.1)
        assert head is not None
        return head
    finally:
        await connection.close()
        await nc.close()


async def stopped(system: System) -> None:
    for name in FORGE:
        system.kill(name)
    nc = await connect(system.nats.url, "test")

    async def nobody() -> bool:
        return not await guard.readers(nc)

    try:
        await wait_until(nobody, 60, "nobody reads the log")
    finally:
        await nc.close()


async def started(system: System) -> None:
    system.start(*FORGE)
    await system.ready()


async def forge(system: System, *words: str, status: int = 0) -> str:
    """What a command says, when it ends with this status."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "forge", *words),
        env=system.environ("projector"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, errors = await process.communicate()
    assert process.returncode == status, (said + errors).decode()
    return (said if "--json" in words else said + errors).decode()
