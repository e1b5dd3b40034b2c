"""Who may come in, and who fetched what: over two APIs, from the command line, through kills."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from acceptance.players import granted
from acceptance.system import API, PATIENCE, System, running
from waiting import wait_until

ICON = {"job_type": "ui_icon", "params": {"width": 256, "height": 256}}


@pytest.fixture(scope="module")
async def system(module_root: Path) -> AsyncIterator[System]:
    async with running(module_root, apis=2, FORGE_ACCESS_FLUSH_SECONDS="1") as system:
        yield system


async def keys(system: System, *words: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}
    told = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "forge", "keys", *words],
        env=environ
        | {"FORGE_NATS_URL": system.nats.url, "FORGE_NATS_PASSWORDS_DIR": str(system.nats.passwords_dir)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return told.stdout.strip()


async def status(system: System, api: str, key: str, body: Any = ICON) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=system.url(api) + API, headers=headers, timeout=PATIENCE) as client:
        return (await client.post("/jobs", json=body)).status_code


async def test_a_key_comes_and_goes_on_every_api_even_without_postgres(system: System) -> None:
    system.kill("postgres")
    key = await keys(system, "create", "--role", "player", "--user", "mei")
    key_id = key.split("_")[1]
    try:
        for api in system.apis:  # refused for its body, which is looked at only behind the door
            await wait_until(lambda api=api: _is(422, status(system, api, key, {})), 10, f"{api} lets mei in")  # type: ignore[misc]
        await wait_until(lambda: _is(202, status(system, "api", key)), 30, "a job is taken")
        await keys(system, "revoke", key_id)
        for api in system.apis:
            await wait_until(lambda api=api: _is(401, status(system, api, key, {})), 10, f"{api} refuses it")  # type: ignore[misc]
        system.kill("api")
        system.start("api")
        await wait_until(lambda: _answers(system, key), 60, "the API is back")
        assert await status(system, "api", key, {}) in (401, 503)
        await wait_until(lambda: _is(401, status(system, "api", key, {})), 60, "it has read the log")
    finally:
        system.start("postgres")
        await system.ready()


async def _is(expected: int, asked: Any) -> bool:
    return bool(await asked == expected)


async def _answers(system: System, key: str) -> bool:
    try:
        return bool(await status(system, "api", key, {}))
    except httpx.TransportError:
        return False


async def test_fetches_are_short_by_at_most_one_interval_after_a_kill(system: System) -> None:
    async with system.client("lan") as lan, system.client("lan", "api2") as other:
        job = (await granted(lan, "POST", "/jobs", json=ICON)).json()["id"]

        async def made() -> Any:
            answer = await lan.get(f"/jobs/{job}")  # 503 while the projector comes back to Postgres
            return answer.status_code == 200 and answer.json()["assets"]

        [asset] = await wait_until(made, 60, "the picture is there")
        path = f"/assets/{asset['id']}"

        async def count() -> int:
            answer = await other.get(path)
            return int(answer.json()["access_count"]) if answer.status_code == 200 else -1

        async def fetch(client: httpx.AsyncClient, times: int) -> None:
            for _ in range(times):
                assert (await client.get(f"{path}/file")).status_code == 200

        await fetch(lan, 5)
        await fetch(other, 2)
        await wait_until(lambda: _is(7, count()), 60, "both have told")

        await fetch(lan, 3)
        system.kill("api")
        system.start("api")
        await fetch(other, 1)
        await wait_until(lambda: _at_least(8, count()), 60, "what the other counted is there")
        after_the_kill = await count()
        assert 8 <= after_the_kill <= 11, "nothing twice, and what was told before stays"

        await system.ready()
        await fetch(lan, 4)
        system.terminate("api")
        stopped = system.process("api")
        await wait_until(lambda: stopped.exit_status is not None, 60, "it has ended")
        assert stopped.exit_status == 0
        await wait_until(lambda: _at_least(after_the_kill + 4, count()), 60, "told at its end")
        assert await count() <= 15
        used = (await other.get(f"{path}/usage")).json()["items"]
        assert [(u["user_id"], u["reads"]) for u in used] == [("lan", await count())]
        system.start("api")


async def test_every_process_is_its_own_user_of_nats(system: System) -> None:
    async with httpx.AsyncClient() as client:
        told = (await client.get(f"{system.nats.monitoring_url}/connz?auth=1")).json()["connections"]
    users = {(one["name"], one["account"], one["authorized_user"]) for one in told if "name" in one}
    parts = {"api", "worker", "projector", "cleanup"}
    assert users == {(f"forge-{part}", "FORGE", part) for part in parts}


async def _at_least(expected: int, asked: Any) -> bool:
    return bool(await asked >= expected)
