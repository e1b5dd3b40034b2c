"""On a real system: what is gone is drawn again, and the past is told as it was when it was the present."""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import nats
import pytest

from acceptance.job_types import write_swatch
from acceptance.players import granted
from acceptance.system import System, running
from waiting import wait_until

ICON = {"width": 256, "height": 256}
RENDER_MS = 200

_seeds = itertools.count(1000)


@pytest.fixture(scope="module")
async def system(module_root: Path) -> AsyncIterator[System]:
    async with running(
        module_root,
        render_ms=f"{RENDER_MS}-{RENDER_MS}",
        FORGE_WORKFLOWS_DIR=str(write_swatch(module_root / "types")),
        FORGE_CLEANUP_GRACE_SECONDS="0.2",
    ) as system:
        yield system


async def asked(client: httpx.AsyncClient, **body: Any) -> str:
    answer = await granted(client, "POST", "/jobs", json={"job_type": "ui_icon", **body})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def over(client: httpx.AsyncClient, job: str) -> dict[str, Any]:
    async def ended() -> Any:
        told = (await client.get(f"/jobs/{job}")).json()
        return told if told["status"] in ("completed", "failed") else None

    return dict(await wait_until(ended, 60, f"job {job} is over", 0.05))


async def expired(system: System, client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """An asset, row and file, that was there and is gone."""
    made = (await over(client, await asked(client, **body, ttl_seconds=1)))["assets"][0]

    async def gone() -> bool:
        left = list(system.assets_dir.glob(f"assets/*/*/{made['content_hash']}*"))
        return not left and (await client.get(f"/assets/{made['id']}")).status_code == 404

    await wait_until(gone, 60, "the asset is gone", 0.1)
    return dict(made)


async def regenerated(client: httpx.AsyncClient, asset: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What forge says of the attempt, and the content that it drew."""
    # ComfyUI keeps the results of its last prompt: then it would not draw at all
    await over(client, await asked(client, params={**ICON, "seed": next(_seeds)}))
    answer = await granted(client, "POST", f"/assets/{asset['id']}/regenerate")
    assert (answer.status_code, answer.json()["cached"]) == (202, False), answer.text
    job = await over(client, answer.json()["id"])
    history = (await client.get(f"/jobs/{job['id']}/history")).json()["items"]
    [picture] = history[-1]["data"]["assets"]
    return job["regenerates"], picture["content_hash"]


async def test_an_expired_asset_is_drawn_again_identically(system: System) -> None:
    async with system.client("mei") as mei:
        asset = await expired(system, mei, params={**ICON, "seed": 1})
        told, content = await regenerated(mei, asset)
        assert told == {"asset_id": asset["id"], "result": "identical", "reason": None}
        assert content == asset["content_hash"]


async def test_another_device_draws_other_pixels_from_the_same_recipe(system: System) -> None:
    async with system.client("mei") as mei:
        asset = await expired(system, mei, params={**ICON, "seed": 2})
        await system.faults(other_device=True)
        told, content = await regenerated(mei, asset)
        await system.faults(other_device=False)
        assert told["result"] == "other_pixels"
        assert content != asset["content_hash"]


async def test_what_its_recipe_cannot_draw_any_more_says_why(system: System) -> None:
    async with system.client("mei") as mei:
        asset = await expired(system, mei, job_type="swatch", params={"color": 255})
        graph = Path(system.environ("api")["FORGE_WORKFLOWS_DIR"]) / "swatch.json"
        graph.write_text(graph.read_text().replace("64", "32"))
        system.kill("api")
        system.start("api")
        await system.ready()
        answer = await granted(mei, "POST", f"/assets/{asset['id']}/regenerate")
        assert (answer.status_code, answer.json()["code"]) == (409, "cannot_regenerate")
        assert "has changed" in answer.json()["detail"]


# ------------------------------------------------------------------ time travel


async def forge(system: System, *words: str) -> Any:
    told = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "forge", *words, "--json"],
        env=system.environ("cli"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


async def head(system: System) -> int:
    nc = await nats.connect(system.nats.url)
    try:
        return int((await nc.jetstream().stream_info("FORGE_EVENTS")).state.last_seq)
    finally:
        await nc.close()


async def test_the_past_is_told_as_it_was(system: System) -> None:
    """With jobs held at ComfyUI: the line, a user's limits and a session's assets, then and now."""
    async with system.client() as client:
        kept = {"X-Forge-User": "lan"}
        client.headers.update(kept)
        for seed in (11, 12):
            await over(client, await asked(client, params={**ICON, "seed": seed}, session_id="past"))
        await system.faults(frozen=True)
        jobs = [
            await asked(client, params={**ICON, "seed": seed}, priority=1 + seed % 10)
            for seed in range(20, 28)
        ]

        async def held() -> bool:
            counts = (await client.get("/queue")).json()["counts"]
            return (counts.get("running"), counts.get("pending")) == (3, 5)

        await wait_until(held, 60, "three are at ComfyUI", 0.05)
        queue = (await client.get("/queue", params={"status": "pending"})).json()["items"]
        limits = (await client.get("/limits")).json()["items"]
        assets = (await client.get("/assets", params={"session_id": "past"})).json()["items"]
        then = f"seq:{await head(system)}"
        await system.faults(frozen=False)
        for job in jobs:
            await over(client, job)
        assert (await granted(client, "DELETE", f"/assets/{assets[0]['id']}")).status_code == 204

    told = await forge(system, "at", then, "queue", "--user", "lan", "--status", "pending")
    assert places(told["items"]) == places(queue)
    assert len(queue) == 5
    told = await forge(system, "at", then, "limits", "--user", "lan")
    assert used(told["items"]) == used(limits)
    told = await forge(system, "at", then, "inventory", "--user", "lan", "--session", "past")
    assert ids(told["items"]) == ids(assets)
    assert len(assets) == 2
    now = await forge(system, "at", "now", "inventory", "--user", "lan", "--session", "past")
    assert ids(now["items"]) == ids(assets[1:])
    assert places((await forge(system, "at", "now", "queue", "--status", "pending"))["items"]) == {}


def places(jobs: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    return {job["id"]: (job["position"], job["priority"], job["status"], job["attempts"]) for job in jobs}


def used(limits: list[dict[str, Any]]) -> dict[str, Any]:
    return {limit["name"]: limit["used"] for limit in limits}


def ids(assets: list[dict[str, Any]]) -> set[str]:
    return {asset["id"] for asset in assets}


async def test_what_was_is_what_would_have_been_under_the_limits_that_were(system: System) -> None:
    """Nobody was refused, and nobody is; who waited, waits as long but for the time that forge itself takes.

    A simulated wait is at least half and at most all of the real one, give or take half a second.
    """
    since = datetime.now(UTC).isoformat()
    async with system.client() as client:
        jobs = []
        for nth in range(16):
            client.headers["X-Forge-User"] = f"user-{nth % 2}"
            jobs.append(await asked(client, params={**ICON, "seed": 100 + nth}))
        for nth, job in enumerate(jobs):
            client.headers["X-Forge-User"] = f"user-{nth % 2}"
            await over(client, job)
    told = await forge(system, "whatif", "--since", since, "--rate-per-hour", "3")
    real, present, given = told["recorded"], told["under_present"], told["under_given"]
    assert told["requests"] == 16
    assert real["jobs"] == present["jobs"] == {"completed": 16}
    assert not any(present["refused"].values())
    for part in ("p50", "p95", "max"):
        assert real["wait"][part] / 2 - 0.5 <= present["wait"][part] <= real["wait"][part] + 0.5, part
    assert sum(given["refused"].values()) == 16 - 2 * 3
