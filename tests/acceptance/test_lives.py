"""The lives a job can have on a whole system: cancelled, failed and asked for again, one of a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from acceptance.evidence import TERMINAL, Evidence, Witness
from acceptance.job_types import STILL, write_still, write_swatch
from acceptance.players import ask_until_answered, granted, request, scaled
from acceptance.settling import happened, settled
from acceptance.system import System, running
from pictures import encoded, noise
from waiting import wait_until

SLOW, QUICK = {"least_ms": 60_000}, {"least_ms": 20}


@pytest.fixture(scope="module")
async def system(module_root: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    job_types = write_still(write_swatch(tmp_path_factory.mktemp("types") / "own"))
    async with running(module_root, FORGE_WORKFLOWS_DIR=str(job_types)) as system:
        yield system


@pytest.fixture
async def mei(system: System) -> AsyncIterator[httpx.AsyncClient]:
    """A player's requests, to a simulator that is quick and well."""
    await system.order("sim", "render", QUICK)
    async with system.client("mei") as client:
        yield client


async def test_cancelled_jobs_leave_comfyui_and_make_room(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    await system.order("sim", "render", SLOW)
    asked = [request("mei") for _ in range(5)]
    jobs = []
    for nth, one in enumerate(asked, 1):
        jobs.append(await ask_until_answered(mei, one))
        there = min(nth, 3)  # in the order in which they were asked for
        await wait_until(lambda n=there: witness.simulator("sim")[-1]["present"] == n, 60, f"{there} prompts")
    drawn, queued, kept, waiting, last = jobs

    for id_ in (waiting, queued, drawn):
        assert (await granted(mei, "DELETE", f"/jobs/{id_}")).status_code == 202
        assert (await granted(mei, "DELETE", f"/jobs/{id_}")).status_code == 409, "said twice, done once"
        if id_ == queued:
            await wait_until(lambda: "removed" in _happenings(witness), 60, "it will never run")
    await happened(witness, "started", job=last)  # its place is free again
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 2, 60, "two prompts")
    for id_ in (kept, last):
        assert (await granted(mei, "DELETE", f"/jobs/{id_}")).status_code == 202

    evidence = await settled(witness, asked)
    assert [_story(evidence, id_) for id_ in (drawn, queued, kept, waiting, last)] == [
        ["submitted", "started", "cancelled"],
        ["submitted", "started", "cancelled"],
        ["submitted", "started", "cancelled"],
        ["submitted", "cancelled"],
        ["submitted", "started", "cancelled"],
    ]
    fates = Counter(line.get("status", line["event"]) for line in evidence.simulators["sim"])
    assert fates["execution_interrupted"] >= 2, "those that ran were stopped"
    assert fates["removed"] >= 1, "those that waited at ComfyUI were taken out"
    assert (await granted(mei, "DELETE", f"/jobs/{drawn}")).status_code == 409
    assert (await granted(mei, "POST", f"/jobs/{drawn}/retry")).status_code == 409


async def test_a_job_cancelled_while_it_is_posted_leaves_no_prompt(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    await system.order("sim", "render", SLOW)
    await system.faults(slow_http_ms=40)
    asked = [request("mei") for _ in range(scaled(12))]
    for one in asked:
        id_ = await ask_until_answered(mei, one)
        await happened(witness, "started", job=id_)
        assert (await granted(mei, "DELETE", f"/jobs/{id_}")).status_code == 202
    await system.faults(slow_http_ms=0)
    evidence = await settled(witness, asked, timeout=SLOW["least_ms"] / 1000 - 10)
    assert all(line.get("status") != "execution_success" for line in evidence.simulators["sim"]), "in time"


async def test_a_job_fails_after_three_attempts_and_is_asked_for_again(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    unlucky, other = request("mei", job_type="still", params={}), request("mei")
    picture = system.files_of("sim") / "input" / STILL
    picture.write_bytes(b"no picture")
    id_ = await ask_until_answered(mei, unlucky)
    await happened(witness, "attempt_failed", job=id_)
    drawn = await happened(witness, "completed", job=await ask_until_answered(mei, other))
    failed = await happened(witness, "failed", job=id_)
    assert failed.data["attempt"] == 3
    assert drawn.seq < failed.seq, "nobody waits for it"
    picture.write_bytes(encoded(noise(96, 64)))
    seen = (await mei.get(f"/jobs/{id_}", params={"min_seq": failed.seq})).json()
    assert (seen["status"], seen["attempts"], seen["error"]["code"]) == ("failed", 3, "prompt_failed")

    assert (await granted(mei, "POST", f"/jobs/{id_}/retry")).status_code == 202
    assert (await granted(mei, "POST", f"/jobs/{id_}/retry")).status_code == 409, "it waits already"
    await happened(witness, "completed", job=id_)
    evidence = await settled(witness, [unlucky, other])
    attempt = ["started", "attempt_failed"]
    assert _story(evidence, id_) == [
        "submitted",
        *attempt,
        *attempt,
        "started",
        "failed",
        "retried",
        "started",
        "completed",
    ]
    _backed_off(evidence, id_)
    seen = (await mei.get(f"/jobs/{id_}", params={"min_seq": evidence.events[-1].seq})).json()
    assert (seen["status"], seen["attempts"], seen["error"]) == ("completed", 4, None)


async def test_a_batch_is_taken_as_a_whole_or_not_at_all(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    before = len(await witness.events())
    bodies: list[dict[str, Any]] = [
        {"job_type": "swatch", "params": {"color": nth % 10 * 1000}, "priority": 1 + nth % 10}
        for nth in range(100)
    ]
    spoilt = [*bodies[:99], {"job_type": "swatch", "params": {"color": -1}}]
    refused = await mei.post("/batch", json={"jobs": spoilt})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "jobs[99].params.color"
    assert (await mei.post("/batch", json={"jobs": [*bodies, bodies[0]]})).status_code == 422
    assert (await mei.post("/batch", json={"jobs": bodies})).status_code == 429, "nobody may have so many"
    assert len(await witness.events()) == before

    answer = await granted(mei, "POST", "/batch", json={"jobs": bodies[:5] * 2})
    assert answer.status_code == 202
    batch = answer.json()
    evidence = await settled(witness, timeout=90)
    admitted = [event.seq for event in evidence.events if event.data.get("batch_id") == batch["batch_id"]]
    assert len(admitted) == 10
    assert admitted == list(range(admitted[0], admitted[0] + 10)), "one write"
    seen = (await mei.get(f"/batch/{batch['batch_id']}", params={"min_seq": evidence.events[-1].seq})).json()
    assert (seen["status"], seen["counts"]["completed"]) == ("completed", 10)
    _equal_pictures_are_one_asset(evidence, {job["id"] for job in batch["jobs"]})


def _equal_pictures_are_one_asset(evidence: Evidence, jobs: set[str]) -> None:
    references = [row for row in evidence.references if str(row["job_id"]) in jobs]
    shared = Counter(row["asset_id"] for row in references)
    assert sorted(shared.values()) == [2] * 5, "five colours, asked for twice each"


def _happenings(witness: Witness) -> list[str]:
    return [line["event"] for line in witness.simulator("sim")]


def _story(evidence: Evidence, job: str) -> list[str]:
    """What happened to a job, in the words of its events."""
    mine = (e for e in evidence.events if e.type.startswith("forge.job.") and e.data["job_id"] == job)
    story = [event.type.split(".")[2] for event in mine]
    assert sum(f"forge.job.{word}.v1" in TERMINAL for word in story) == 1 + story.count("retried")
    return story


def _backed_off(evidence: Evidence, job: str) -> None:
    """Every new attempt came when its time was due, and soon then."""
    mine = [e for e in evidence.events if e.type.startswith("forge.job.") and e.data["job_id"] == job]
    waits = []
    for event, following in pairwise(mine):
        if event.type == "forge.job.attempt_failed.v1":
            due = datetime.fromisoformat(event.data["retry_at"])
            assert timedelta(0) <= following.at - due < timedelta(seconds=10)
            waits.append(round((due - event.at).total_seconds()))
    assert waits == [2, 10]
