"""A job that ends, or freezes, every worker that takes it: it is given up, and takes nobody along."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import httpx
import nats
import pytest

from acceptance.checker import Asked
from acceptance.evidence import Message, Witness
from acceptance.failpoints import HASTE, HASTY_ATTEMPTS, Failpoints
from acceptance.players import SCALE, ask_until_answered, request
from acceptance.settling import happened, settled
from acceptance.system import System, running, say
from forge.domain.ids import keyed_job_id, prompt_id
from forge.domain.limits import MAX_ADOPTIONS, MAX_ATTEMPTS
from waiting import wait_until

LEASE_SECONDS = 10.0
HURRY = 1 if SCALE > 1 else 5
"""Twelve real leases and their back-offs are over two minutes: those come with `FORGE_TEST_SCALE`."""
ATTEMPTS = MAX_ATTEMPTS if SCALE > 1 else HASTY_ATTEMPTS
SPARE = 3
"""More deaths than are due."""
PLACE = "worker: before the fetch"
WORKERS_LOST = ATTEMPTS * (1 + MAX_ADOPTIONS)


@pytest.fixture(scope="module")
def failpoints(module_root: Path) -> Failpoints:
    return Failpoints(module_root / "armed")


@pytest.fixture(scope="module")
async def system(module_root: Path, failpoints: Failpoints) -> AsyncIterator[System]:
    more = failpoints.environ | ({HASTE: str(HURRY)} if HURRY > 1 else {})
    async with running(module_root, render_ms="20-60", **more) as system:
        await _shorten_leases(system)
        yield system


async def _shorten_leases(system: System) -> None:
    nc = await nats.connect(system.nats.url)
    consumer = (await nc.jetstream().consumer_info("FORGE_DISPATCH", "generation")).config
    assert consumer.ack_wait == LEASE_SECONDS
    consumer.ack_wait = LEASE_SECONDS / HURRY
    await nc.jetstream().add_consumer("FORGE_DISPATCH", consumer)
    await nc.close()


@pytest.mark.fault("K9")
@pytest.mark.timeout(400)
async def test_a_job_that_ends_every_worker_is_given_up_and_takes_nobody_along(
    system: System, witness: Witness, failpoints: Failpoints
) -> None:
    deadly = request("mei")
    job = str(keyed_job_id(deadly.user, deadly.key))
    failpoints.arm(PLACE, action="stop", about=job)
    failpoints.arm(PLACE, action="kill", times=WORKERS_LOST - 1 + SPARE, about=job)
    asked = [deadly, request("lin"), request("lin")]
    async with system.client() as client:
        for one in asked:  # the three places: all of them lie in one worker's hands
            await ask_until_answered(client, one)
        over = asyncio.create_task(happened(witness, "failed", job=job, timeout=300))
        await wait_until(failpoints.taken, 60, "the first worker is frozen")
        system.start("generation2")
        asked += await _asking(client, "tao", over)
        system.thaw("generation")
    evidence = await settled(witness, asked)

    assert _life(evidence.events, job) == [
        "submitted",
        *["started", *["adopted"] * MAX_ADOPTIONS, "attempt_failed"] * (ATTEMPTS - 1),
        *["started", *["adopted"] * MAX_ADOPTIONS, "failed"],
    ]
    assert "workers were lost" in evidence.jobs[job]["error_message"]
    assert len(failpoints.waiting()) == SPARE
    assert len(system.deaths) == WORKERS_LOST - 1, system.deaths
    others = {id_ for one in asked for id_ in one.answers} - {job}
    found = {id_: Counter(_life(evidence.events, id_)) for id_ in others}
    say(f"{len(others)} others: {sum(found.values(), Counter())}")
    assert all(life["completed"] for life in found.values()), found
    sent = {line["prompt_id"] for line in evidence.simulators["sim"] if line["event"] == "submitted"}
    failed = _failed_prompts(evidence.events, others)
    assert not failed & sent  # an attempt is lost where the worker is ended between its start and its POST


def _failed_prompts(events: list[Message], jobs: set[str]) -> set[str]:
    return {
        str(prompt_id(UUID(event.data["job_id"]), event.data["attempt"]))
        for event in events
        if event.type == "forge.job.attempt_failed.v1" and event.data["job_id"] in jobs
    }


async def _asking(client: httpx.AsyncClient, user: str, until: asyncio.Task[Message]) -> list[Asked]:
    """A player who asks for one picture after the other, each when the one before is there."""
    asked: list[Asked] = []
    while not until.done():
        asked.append(request(user))
        id_ = await ask_until_answered(client, asked[-1])

        async def over(id_: str = id_) -> bool:
            return until.done() or (await client.get(f"/jobs/{id_}")).json()["status"] in (
                "completed",
                "failed",
            )

        await wait_until(over, 300, f"{id_} is over", 0.1)
    until.result()
    return asked


def _life(events: list[Message], job: str) -> list[str]:
    return [
        e.type.split(".")[2] for e in events if e.type.startswith("forge.job.") and e.data["job_id"] == job
    ]
