"""SIGTERM of a busy worker: what is nearly done is finished, the rest is adopted, nothing is drawn twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from acceptance.players import ask_until_answered, request
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import running
from waiting import wait_until

DRAIN_SECONDS = 15
RENDER_SECONDS = 7
"""Of the three that run at SIGTERM, two are done while the worker drains, and the third is not."""


@pytest.mark.timeout(180)
@pytest.mark.fault("C2")
async def test_what_a_stopping_worker_cannot_finish_is_adopted_at_once(root: Path) -> None:
    asked = [request(f"user-{nth}") for nth in range(5)]
    async with running(root, render_ms=str(RENDER_SECONDS * 1000)) as system, watching(system) as witness:
        async with system.client() as client:
            jobs = [await ask_until_answered(client, one) for one in asked]
        for job in jobs[:3]:
            await happened(witness, "started", job=job)
        await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 3, what="three prompts")
        first = (await witness.jobs())[jobs[0]][1].data["worker"]
        system.start("generation2")
        system.terminate("generation")
        stopping = system.process("generation")
        adopted = await happened(witness, "adopted", timeout=DRAIN_SECONDS + 15)
        await wait_until(lambda: stopping.exit_status is not None, 5, "the old worker has ended")
        assert stopping.exit_status == 0
        await system.order("sim", "render", {"least_ms": 50})  # for those that come after

        evidence = await settled(witness, asked, timeout=90)
        assert set(ends(evidence)) == {"completed"}
        assert sum(line["event"] == "started" for line in evidence.simulators["sim"]) == len(jobs)
        starts = {e.data["job_id"]: e for e in evidence.events if e.type == "forge.job.started.v1"}
        assert {event.data["attempt"] for event in starts.values()} == {1}
        assert [starts[job].data["worker"] == first for job in jobs] == [True, True, True, False, False]
        adoptions = [e for e in evidence.events if e.type == "forge.job.adopted.v1"]
        assert [event.data["job_id"] for event in adoptions] == [jobs[2]]
        assert adopted.data["worker"] != first
        asked_to_stop = min(e.at for e in evidence.events if e.data.get("worker", first) != first)
        assert (adopted.at - asked_to_stop).total_seconds() < DRAIN_SECONDS + 2
