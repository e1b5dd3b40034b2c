"""Limits as clients meet them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import httpx
import msgspec
import pytest

from api.making import completed
from api.serving import Serve, Served
from forge.broker import request as ask
from forge.settings import Settings

SWATCH = {"job_type": "ui_icon", "params": {"width": 256, "height": 256}}
SEEDED = {"job_type": "ui_icon", "params": {"width": 256, "height": 256, "seed": 7}}


async def limits(client: httpx.AsyncClient, **query: str) -> dict[str, tuple[int, int]]:
    """Name → allowed and used."""
    items = (await client.get("/limits", params=query)).json()["items"]
    return {item["name"]: (item["allowed"], item["used"]) for item in items}


async def test_the_eleventh_job_is_told_what_it_met(mei: httpx.AsyncClient, lan: httpx.AsyncClient) -> None:
    for _ in range(10):
        assert (await mei.post("/jobs", json=SWATCH)).status_code == 202
    refused = await mei.post("/jobs", json=SWATCH)
    assert refused.status_code == 429
    assert refused.headers["content-type"] == "application/problem+json"
    assert int(refused.headers["retry-after"]) > 0
    problem = refused.json()
    assert problem["code"] == "limit_reached"
    assert problem["limit"] == {"name": "queued_jobs", "allowed": 10, "used": 10, "resets_at": None}
    assert (await lan.post("/jobs", json=SWATCH)).status_code == 202


@pytest.mark.fault("Q1")
async def test_a_hundred_at_one_moment_of_whom_thirty_say_it_twice(mei: httpx.AsyncClient) -> None:
    """70 requests, 30 of them said twice: ten jobs, and who says it twice is answered alike."""
    keys = [f"k{nth}" for nth in range(70)] + [f"k{nth}" for nth in range(30)]
    answers = await asyncio.gather(
        *(mei.post("/jobs", json=SWATCH, headers={"Idempotency-Key": key}) for key in keys)
    )
    assert {answer.status_code for answer in answers} == {202, 429}
    granted = {key: a.json()["id"] for key, a in zip(keys, answers, strict=True) if a.status_code == 202}
    assert len(set(granted.values())) == 10
    again = [await mei.post("/jobs", json=SWATCH, headers={"Idempotency-Key": key}) for key in granted]
    assert [answer.json()["id"] for answer in again] == list(granted.values())


async def test_the_hour_says_when_it_is_over(serve: Serve, settings: Settings) -> None:
    served = await serve(with_settings=msgspec.structs.replace(settings, rate_per_hour=1))
    async with served.client("mei") as mei:
        asked_at = datetime.now(UTC)
        assert (await mei.post("/jobs", json=SWATCH)).status_code == 202
        refused = await mei.post("/jobs", json=SWATCH)
        limit = refused.json()["limit"]
        assert (refused.status_code, limit["name"], limit["used"]) == (429, "generations_per_hour", 1)
        resets_at = datetime.fromisoformat(limit["resets_at"])
        assert timedelta(hours=1) <= resets_at - asked_at < timedelta(hours=1, minutes=1)
        assert 3500 < int(refused.headers["retry-after"]) <= 3601


async def test_limits_are_the_callers(mei: httpx.AsyncClient, lan: httpx.AsyncClient) -> None:
    await mei.post("/jobs", json=SWATCH)
    mine = await limits(mei)
    assert (mine["queued_jobs"], mine["generations_per_hour"][1]) == ((10, 1), 1)
    assert (mine["running_jobs"], mine["waiting_jobs"][1]) == ((3, 0), 1)
    assert (await limits(lan))["queued_jobs"] == (10, 0)


async def test_limits_of_a_session_and_a_character(served: Served, mei: httpx.AsyncClient) -> None:
    asked = await mei.post("/jobs", json=SWATCH | {"session_id": "s", "character_id": "c"})
    await completed(served.parts, "mei", asked.json())
    theirs = await limits(mei, session_id="s", character_id="c")
    assert theirs["character_assets"] == (100, 1)
    assert theirs["session_bytes"][0] == 2 * 1024**3
    assert theirs["session_bytes"][1] > 0
    assert (await mei.get("/limits", params={"session_id": "\x00"})).status_code == 422


async def test_the_same_recipe_is_answered_at_once(
    served: Served, mei: httpx.AsyncClient, lan: httpx.AsyncClient
) -> None:
    await completed(served.parts, "mei", (await mei.post("/jobs", json=SEEDED)).json())
    asked = {"json": SEEDED | {"session_id": "s"}, "headers": {"Idempotency-Key": "k"}}
    answer = await lan.post("/jobs", **asked)
    job = answer.json()
    assert (answer.status_code, job["status"], job["cached"], job["attempts"]) == (202, "completed", True, 0)
    assert (await lan.get(f"/jobs/{job['id']}", params={"min_seq": job["seq"]})).json() == job
    assert (await lan.post("/jobs", **asked)).json() == job
    [asset] = job["assets"]
    assert (await lan.get(f"/assets/{asset['id']}/file")).status_code == 200
    told = (await lan.get(f"/jobs/{job['id']}/history")).json()["items"]
    assert [item["type"] for item in told] == ["job.submitted", "job.completed"]
    stats = (await lan.get("/stats", params={"min_seq": job["seq"]})).json()
    assert stats["cache"]["hits"] == 1
    another = (await mei.post("/jobs", json=SWATCH)).json()
    assert another["status"] == "pending", "another seed is another picture"


@pytest.mark.fault("B1")
async def test_a_full_log_is_the_systems_fault_and_says_when_to_come_again(
    served: Served, mei: httpx.AsyncClient
) -> None:
    nc = served.parts.nc
    config = msgspec.json.decode(await ask(nc, "STREAM.INFO.FORGE_EVENTS"))["config"]
    await ask(nc, "STREAM.UPDATE.FORGE_EVENTS", config | {"max_bytes": 1})
    refused = await mei.post("/jobs", json=SWATCH)
    assert (refused.status_code, "retry-after" in refused.headers) == (503, True), refused.text
    await ask(nc, "STREAM.UPDATE.FORGE_EVENTS", config)
    assert (await mei.post("/jobs", json=SWATCH)).status_code == 202
