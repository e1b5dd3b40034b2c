"""Two ComfyUIs: work goes on at the fallback when the preferred one dies or freezes, and comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from acceptance.evidence import Witness
from acceptance.job_types import TIMEOUT, write_swatch
from acceptance.players import ask_until_answered, request
from acceptance.settling import happened, settled, watching
from acceptance.system import System, running
from waiting import wait_until


@pytest.fixture(scope="module")
async def system(module_root: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    job_types = write_swatch(tmp_path_factory.mktemp("types") / "own")
    settings = {"FORGE_WORKFLOWS_DIR": str(job_types)}
    async with running(module_root, render_ms="20-50", simulators=2, **settings) as system:
        yield system


@pytest.fixture(scope="module")
async def witness(system: System) -> AsyncIterator[Witness]:
    async with watching(system) as witness:
        yield witness


@pytest.fixture
async def mei(system: System) -> AsyncIterator[httpx.AsyncClient]:
    async with system.client("mei") as client:
        yield client


async def test_a_dead_server_is_left_and_returned_to(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    before = await _drawn_by(witness, mei)
    system.kill("sim")
    await _until_drawn_by(system.url("sim2"), witness, mei)
    system.start("sim")
    await _until_drawn_by(system.url("sim"), witness, mei)
    evidence = await settled(witness)
    starts = [event for event in evidence.events if event.type == "forge.job.started.v1"]
    assert before == system.url("sim")
    assert all("preferred" in e.data["reason"] for e in starts if e.data["backend"] == system.url("sim"))
    assert all("fallback" in e.data["reason"] for e in starts if e.data["backend"] == system.url("sim2"))


@pytest.mark.timeout(240)
async def test_a_frozen_server_costs_attempts_and_no_jobs(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    await system.faults("sim", frozen=True)
    asked = [request("mei", job_type="swatch", params={"color": nth}) for nth in range(5)]
    jobs = [await ask_until_answered(mei, one) for one in asked]
    timed_out = await happened(witness, "attempt_failed", job=jobs[0], timeout=TIMEOUT + 80)
    assert timed_out.data["code"] == "prompt_timed_out"
    began = await happened(witness, "started", job=jobs[0])
    assert (timed_out.at - began.at).total_seconds() > TIMEOUT

    evidence = await settled(witness, asked, timeout=60, given_up=["sim"])
    story = [event for event in evidence.events if event.data.get("job_id") in jobs]
    assert sum(event.type == "forge.job.completed.v1" for event in story) == len(jobs)
    ended_at = {e.data["job_id"]: e.data["backend"] for e in story if e.type == "forge.job.started.v1"}
    assert set(ended_at.values()) == {system.url("sim2")}

    await system.faults("sim", frozen=False)
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 0, 30, "the frozen prompt ends")
    await _until_drawn_by(system.url("sim"), witness, mei)
    await settled(witness, asked, given_up=["sim"])


async def _drawn_by(witness: Witness, mei: httpx.AsyncClient) -> str:
    """The server that completes a job now."""
    id_ = await ask_until_answered(mei, request("mei"))
    await happened(witness, "completed", job=id_, timeout=60)
    starts = [event for event in (await witness.jobs())[id_] if event.type == "forge.job.started.v1"]
    backend: str = starts[-1].data["backend"]
    return backend


async def _until_drawn_by(url: str, witness: Witness, mei: httpx.AsyncClient) -> None:
    async def drawn() -> bool:
        return await _drawn_by(witness, mei) == url

    await wait_until(drawn, 60, f"work goes to {url}", 0.1)
