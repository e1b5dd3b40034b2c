"""Two ComfyUIs [I4]: work goes on at the fallback when the preferred one dies or freezes, and comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from acceptance.evidence import Witness
from acceptance.job_types import TIMEOUT, write_swatch
from acceptance.players import ask_until_answered, granted, request
from acceptance.settling import happened, settled
from acceptance.system import System, running
from waiting import wait_until


@pytest.fixture(scope="module")
async def system(module_root: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[System]:
    job_types = write_swatch(tmp_path_factory.mktemp("types") / "own")
    settings = {
        "FORGE_WORKFLOWS_DIR": str(job_types),
        "FORGE_COMFYUI_UNREACHABLE_SECONDS": "3",
        "FORGE_COMFYUI_CANCEL_SECONDS": "3",
    }
    async with running(module_root, render_ms="20-50", simulators=2, **settings) as system:
        yield system


@pytest.fixture
async def mei(system: System) -> AsyncIterator[httpx.AsyncClient]:
    async with system.client("mei") as client:
        yield client


async def test_a_dead_server_is_left_and_returned_to(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    await _told(mei, "preferred")  # a worker has seen that both are there
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


async def test_a_server_that_is_dead_at_the_start_is_done_without(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    system.kill("sim")
    system.kill("generation")
    asked = [request("mei") for _ in range(4)]
    jobs = [await ask_until_answered(mei, one) for one in asked]
    system.start("generation")
    await _all_complete(witness, jobs)
    assert await _backends_of(witness, jobs) == {system.url("sim2")}
    await _told(mei, "fallback")
    system.start("sim")
    await _until_drawn_by(system.url("sim"), witness, mei)
    await _told(mei, "preferred")
    evidence = await settled(witness, asked)
    assert {evidence.jobs[job]["attempts"] for job in jobs} == {1}, "it cost nobody an attempt"


@pytest.mark.fault("K7")
async def test_prompts_of_a_dying_server_are_drawn_by_the_other(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    await system.order("sim", "render", {"least_ms": 60_000})
    asked = [request("mei") for _ in range(5)]
    jobs = [await ask_until_answered(mei, one) for one in asked]
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 3, 60, "one runs, two wait")
    system.kill("sim")
    await _all_complete(witness, jobs)
    evidence = await settled(witness, asked)
    tries = sorted(evidence.jobs[job]["attempts"] for job in jobs)
    assert tries == [1, 1, 2, 2, 2], "each prompt that was lost cost one attempt"
    system.start("sim")
    await _until_drawn_by(system.url("sim"), witness, mei)
    await wait_until(lambda: not witness.left_at_comfyui()["sim"], 60, "its files are gone, too")


@pytest.mark.fault("K7")
async def test_jobs_wait_while_no_server_is_there_and_then_drain(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    system.kill("sim")
    system.kill("sim2")
    await _told(mei, "none")
    asked = [request("mei") for _ in range(6)]
    jobs = [await ask_until_answered(mei, one) for one in asked]
    await wait_until(lambda: _three_ordered(witness), 60, "three places are taken")
    gone, *waiting = jobs
    assert (await granted(mei, "DELETE", f"/jobs/{gone}")).status_code == 202
    system.start("sim2", "sim")
    await _all_complete(witness, waiting)
    evidence = await settled(witness, asked)
    assert {evidence.jobs[job]["attempts"] for job in waiting} == {1}, "waiting costs no attempt"
    await _until_drawn_by(system.url("sim"), witness, mei)


@pytest.mark.timeout(240)
@pytest.mark.fault("H5")
async def test_a_stopped_server_is_left_with_its_prompts_and_cleaned_when_it_goes_on(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    await system.order("sim", "render", {"least_ms": 60_000})
    asked = [request("mei") for _ in range(5)]
    jobs = [await ask_until_answered(mei, one) for one in asked]
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 3, 60, "one runs, two wait")
    await system.freeze("sim")  # its socket takes connections and nobody answers
    await _all_complete(witness, jobs)
    await settled(witness, asked, given_up=["sim"])
    system.kill("generation")  # whoever knew what is still there
    system.start("generation")
    system.thaw("sim")
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 0, 60, "its prompts are gone")
    await system.order("sim", "render", {"least_ms": 20})
    await _until_drawn_by(system.url("sim"), witness, mei)
    await wait_until(lambda: not witness.left_at_comfyui()["sim"], 60, "its files are gone, too")
    await settled(witness, asked, given_up=["sim"])


@pytest.mark.timeout(240)
@pytest.mark.fault("H5")
async def test_a_frozen_server_costs_attempts_and_no_jobs(
    system: System, witness: Witness, mei: httpx.AsyncClient
) -> None:
    await system.faults("sim", frozen=True)
    asked = [request("mei", job_type="swatch", params={"color": nth}) for nth in range(5)]
    jobs = [await ask_until_answered(mei, asked[0])]
    await wait_until(lambda: witness.simulator("sim")[-1]["event"] == "started", 60, "it runs")
    jobs += [await ask_until_answered(mei, one) for one in asked[1:]]
    timed_out = await happened(witness, "attempt_failed", job=jobs[0], timeout=TIMEOUT + 80)
    assert timed_out.data["code"] == "prompt_timed_out"
    began = await happened(witness, "started", job=jobs[0])
    assert (timed_out.at - began.at).total_seconds() > TIMEOUT

    evidence = await settled(witness, asked, timeout=90, given_up=["sim"])
    story = [event for event in evidence.events if event.data.get("job_id") in jobs]
    assert sum(event.type == "forge.job.completed.v1" for event in story) == len(jobs)
    ended_at = {e.data["job_id"]: e.data["backend"] for e in story if e.type == "forge.job.started.v1"}
    assert set(ended_at.values()) == {system.url("sim2")}

    await system.faults("sim", frozen=False)
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 0, 60, "the frozen prompt ends")
    await _until_drawn_by(system.url("sim"), witness, mei)
    await settled(witness, asked, given_up=["sim"])


async def _all_complete(witness: Witness, jobs: list[str]) -> None:
    for job in jobs:
        await happened(witness, "completed", job=job, timeout=60)


async def _backends_of(witness: Witness, jobs: list[str]) -> set[str]:
    """Where these jobs were started."""
    known = await witness.jobs()
    return {e.data["backend"] for job in jobs for e in known[job] if e.type == "forge.job.started.v1"}


async def _three_ordered(witness: Witness) -> bool:
    return len(await witness.orders()) == 3


async def _told(client: httpx.AsyncClient, state: str) -> None:
    """Wait until users are told so; a worker that was killed is believed for some seconds."""

    async def said() -> bool:
        answer = await client.get("/backends")
        assert answer.status_code == 200
        return bool(answer.json()["state"] == state)

    await wait_until(said, 60, f"users are told: {state}", 0.1)


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
