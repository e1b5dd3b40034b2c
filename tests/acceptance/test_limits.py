"""Limits on real processes: a hundred at one moment, a character that is full, work that was done before."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from acceptance.checker import Asked
from acceptance.evidence import Evidence, Witness
from acceptance.job_types import write_swatch
from acceptance.players import ask_until_answered, granted, request
from acceptance.settling import ends, settled, watching
from acceptance.system import System, running
from waiting import wait_until

SWATCH = {"width": 256, "height": 256}


async def refused(client: httpx.AsyncClient, asked: Asked) -> str:
    """Ask once; the limit that was met, or nothing when it was granted."""
    headers = {"Idempotency-Key": asked.key, "X-Forge-User": asked.user}
    answer = await client.post("/jobs", json=asked.body, headers=headers)
    if answer.status_code == 202:
        asked.answers.append(answer.json()["id"])
        return ""
    assert answer.status_code == 429, answer.text
    assert int(answer.headers["retry-after"]) > 0
    limit: str = answer.json()["limit"]["name"]
    return limit


async def at_once(system: System, said: Sequence[Asked]) -> Counter[str]:
    """Say all of it at the same moment, to two API processes in turn; the limits that were met."""
    async with system.client(api="api") as one, system.client(api="api2") as other:
        for client in (one, other):
            client.timeout = httpx.Timeout(30.0)
        turns = (refused((one, other)[nth % 2], asked) for nth, asked in enumerate(said))
        return Counter(await asyncio.gather(*turns))


@pytest.mark.fault("Q1")
async def test_of_a_hundred_at_one_moment_ten_are_granted(root: Path) -> None:
    """L2, Q1: one user, two API processes, thirty requests said twice, no worker yet."""
    async with running(root, apis=2, workers=("projector",)) as system, watching(system) as witness:
        asked = [request("mei") for _ in range(70)]
        met = await at_once(system, [*asked, *asked[:30]])
        assert set(met) == {"", "queued_jobs"}
        granted = [one for one in asked if one.answers]
        assert len(granted) == 10
        assert len({id_ for one in granted for id_ in one.answers}) == 10
        system.start("dispatcher", "generation", "housekeeping")
        evidence = await settled(witness, asked, timeout=60)
        assert Counter(ends(evidence)) == {"completed": 10}


@pytest.mark.timeout(240)
async def test_a_character_gets_a_hundred_assets_and_no_more(root: Path) -> None:
    """L4: from many users at one moment over two API processes. What was granted beyond it, because neither
    knew of the other yet, is refused when its pictures are there, and they do not stay."""
    settings = {
        "FORGE_WORKFLOWS_DIR": str(write_swatch(root / "types")),
        "FORGE_ORPHAN_GRACE_SECONDS": "5",
    }
    async with running(root, apis=2, render_ms="0", **settings) as system, watching(system) as witness:
        asked = [
            request(f"user-{nth // 10}", job_type="swatch", params={"color": nth}, character_id="npc")
            for nth in range(120)
        ]
        met = await at_once(system, asked)
        assert set(met) == {"", "character_assets"}
        evidence = await wait_until(lambda: _tidy(witness, asked), 120, "what was refused is gone", 1.0)
        assert Counter(ends(evidence))["completed"] == 100
        assert sum(event.type == "forge.asset.ready.v1" for event in evidence.events) == 100
        async with system.client() as client:
            items = (await client.get("/limits", params={"character_id": "npc"})).json()["items"]
        assert next(item for item in items if item["name"] == "character_assets")["used"] == 100


async def _tidy(witness: Witness, asked: Sequence[Asked]) -> Evidence | None:
    """Everything, once no file is without its row."""
    try:
        return await settled(witness, asked, timeout=120)
    except AssertionError as wrong:
        if "has no row" not in str(wrong):
            raise
    return None


async def test_identical_work_is_drawn_once(root: Path) -> None:
    """M7: asked for by three users at one moment, and once more when it is done."""
    same = {**SWATCH, "seed": 7}
    async with running(root, render_ms="300") as system, watching(system) as witness:
        async with system.client() as client:
            asked = [request(user, params=same) for user in ("mei", "lin", "tao")]
            await asyncio.gather(*(ask_until_answered(client, one) for one in asked))
            await settled(witness, asked)
            await wait_until(lambda: _known_to_be_over(client, asked), 60, "the API has read of their ends")
            late = request("yun", params=same)
            said = {"Idempotency-Key": late.key, "X-Forge-User": "yun"}
            job = (await granted(client, "POST", "/jobs", json=late.body, headers=said)).json()
            late.answers.append(job["id"])
            assert (job["status"], job["cached"]) == ("completed", True)
        evidence = await settled(witness, [*asked, late])
        drawn = [line for line in evidence.simulators["sim"] if line["event"] == "started"]
        assert len(drawn) == 1
        assert len(evidence.assets) == len(evidence.files) == 1
        assert {row["user_id"] for row in evidence.references} == {"mei", "lin", "tao", "yun"}
        cached = [e.data.get("cached", False) for e in evidence.events if e.type == "forge.job.completed.v1"]
        assert Counter(cached) == {False: 1, True: 3}


async def _known_to_be_over(client: httpx.AsyncClient, asked: Sequence[Asked]) -> bool:
    used = []
    for one in asked:
        items = (await client.get("/limits", headers={"X-Forge-User": one.user})).json()["items"]
        used += [item["used"] for item in items if item["name"] == "queued_jobs"]
    return used == [0] * len(asked)
