"""SIGTERM of a busy worker: what is nearly done is finished, the rest is adopted, nothing is drawn twice."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from acceptance.players import ask_until_answered, request
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import running
from waiting import wait_until

DRAIN_SECONDS, LEASE_SECONDS = 15, 10
RENDER_SECONDS = 4
"""Of the three that run at SIGTERM, two are done while the worker drains; then ComfyUI stands still."""


@pytest.mark.fault("C2")
async def test_what_a_stopping_worker_cannot_finish_is_adopted_at_once(root: Path) -> None:
    asked = [request(f"user-{nth}") for nth in range(5)]
    async with running(root, render_ms=str(RENDER_SECONDS * 1000)) as system, watching(system) as witness:
        await system.faults(frozen=True)
        jobs = []
        async with system.client() as client:
            for nth, one in enumerate(asked, 1):
                jobs.append(await ask_until_answered(client, one))
                there = min(nth, 3)  # in the order in which they were asked for
                await wait_until(lambda n=there: witness.simulator("sim")[-1]["present"] == n, 60, f"{there}")
        first = (await happened(witness, "started", job=jobs[0])).data["worker"]
        system.start("generation2")
        asked_to_stop = datetime.now(UTC)
        system.terminate("generation")
        stopping = system.process("generation")
        await system.faults(frozen=False)
        for job in jobs[:2]:
            await happened(witness, "completed", job=job)
        await system.faults(frozen=True)
        adopted = await happened(witness, "adopted")
        await wait_until(lambda: stopping.exit_status is not None, 30, "the old worker has ended")
        assert stopping.exit_status == 0
        await system.order("sim", "render", {"least_ms": 50})  # for those that come after
        await system.faults(frozen=False)

        evidence = await settled(witness, asked, timeout=90)
        assert set(ends(evidence)) == {"completed"}
        assert sum(line["event"] == "started" for line in evidence.simulators["sim"]) == len(jobs)
        starts = {e.data["job_id"]: e for e in evidence.events if e.type == "forge.job.started.v1"}
        assert {event.data["attempt"] for event in starts.values()} == {1}
        assert [starts[job].data["worker"] == first for job in jobs] == [True, True, True, False, False]
        adoptions = [e for e in evidence.events if e.type == "forge.job.adopted.v1"]
        assert [event.data["job_id"] for event in adoptions] == [jobs[2]]
        assert adopted.data["worker"] != first
        took = (adopted.at - asked_to_stop).total_seconds()
        assert took < DRAIN_SECONDS + LEASE_SECONDS / 2, "not only when the lease ends"
