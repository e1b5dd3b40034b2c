"""SIGSTOP of each part, as of a machine that swaps: bounded answers, and no harm from who wakes up late."""

from __future__ import annotations

import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from acceptance.checker import Asked
from acceptance.evidence import Witness
from acceptance.players import ask, ask_until_answered, request
from acceptance.settling import ends, happened, settled
from acceptance.system import System, running
from waiting import wait_until


@pytest.fixture(scope="module")
async def system(module_root: Path) -> AsyncIterator[System]:
    async with running(module_root, render_ms="50-200", apis=2) as system:
        yield system


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    return []


@pytest.fixture
async def mei(system: System) -> AsyncIterator[httpx.AsyncClient]:
    async with system.client("mei") as mei:
        yield mei


@pytest.mark.fault("H1")
async def test_a_frozen_api_holds_up_nobody_else(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    system.freeze("api2")
    asked.append(request("mei"))
    async with system.client("mei", "api2") as there:
        with pytest.raises(httpx.TimeoutException):
            await there.post(
                "/jobs", json=asked[-1].body, headers={"Idempotency-Key": asked[-1].key}, timeout=1
            )
        job = await ask_until_answered(mei, asked[-1])
        await happened(witness, "completed", job=job)
        system.thaw("api2")
        assert await ask_until_answered(there, asked[-1]) == job, "what it took in its sleep is the same job"
    await settled(witness, asked)


@pytest.mark.fault("H2")
@pytest.mark.timeout(180)
async def test_a_worker_that_wakes_up_late_concludes_nothing(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    await system.order("sim", "render", {"least_ms": 4000})
    jobs = []
    for _ in range(3):
        asked.append(request("mei"))
        jobs.append(await ask_until_answered(mei, asked[-1]))
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 3, 20, "three prompts")
    system.freeze("generation")
    system.start("generation2")
    for job in jobs:
        await happened(witness, "adopted", job=job)
    system.thaw("generation")
    await system.order("sim", "render", {"least_ms": 50})
    evidence = await settled(witness, asked)
    assert set(ends(evidence, jobs)) == {"completed"}


@pytest.mark.fault("H3")
async def test_a_frozen_log_is_told_in_time(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    system.freeze("nats")
    asked.append(request("mei"))
    began = time.monotonic()
    assert await ask(mei, asked[-1]) is None, "a 503 that says when to come again"
    assert time.monotonic() - began < 3, "no hang: a second, and room for a busy machine"
    assert (await mei.get("/assets")).status_code == 200, "reading goes on"
    system.thaw("nats")
    await ask_until_answered(mei, asked[-1])
    await settled(witness, asked)


@pytest.mark.fault("H4")
async def test_a_frozen_postgres_stops_reading_and_nothing_else(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    system.freeze("postgres")
    asked.append(request("mei"))
    job = await ask_until_answered(mei, asked[-1])
    await happened(witness, "completed", job=job)
    answer = await mei.get("/assets", timeout=15)
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
    system.thaw("postgres")

    async def read() -> bool:
        return (await mei.get("/assets")).status_code == 200

    await wait_until(read, 20, "the tables are read again")
    await settled(witness, asked)


@pytest.mark.fault("C2")
async def test_a_second_word_to_stop_is_obeyed_at_once(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    await system.order("sim", "render", {"least_ms": 5000})
    asked.append(request("mei"))
    await ask_until_answered(mei, asked[-1])
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 1, 20, "it is drawn")
    present = [name for name in ("generation", "generation2") if name in system.members]
    for name in present:
        system.terminate(name)
        process = system.process(name)
        await wait_until(lambda name=name: "stopping" in _log(system, name), 10, "it was told")
        process.send(signal.SIGTERM)
        await wait_until(lambda process=process: process.exit_status is not None, 5, "it has ended")
        assert process.exit_status == 130
    await system.order("sim", "render", {"least_ms": 50})
    system.start(*present)
    await settled(witness, asked, timeout=90)


def _log(system: System, name: str) -> str:
    return (system.root / "log" / f"{name}.log").read_text()
