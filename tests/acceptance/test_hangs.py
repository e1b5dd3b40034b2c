"""SIGSTOP of each part, as of a machine that swaps: bounded answers, and no harm from who wakes up late."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from acceptance.checker import Asked
from acceptance.evidence import Witness
from acceptance.players import ask, ask_until_answered, in_time, request
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
    await system.freeze("api2")
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
async def test_a_worker_that_wakes_up_late_concludes_nothing(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    await system.faults(frozen=True)  # nothing ends before the worker is frozen, too
    jobs = []
    for _ in range(3):
        asked.append(request("mei"))
        jobs.append(await ask_until_answered(mei, asked[-1]))
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 3, 60, "three prompts")
    await system.freeze("generation")
    system.start("generation2")
    for job in jobs:
        await happened(witness, "adopted", job=job)
    await system.faults(frozen=False)
    system.thaw("generation")
    evidence = await settled(witness, asked)
    assert set(ends(evidence, jobs)) == {"completed"}


@pytest.mark.fault("H3")
async def test_a_frozen_log_is_told_in_time(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    await system.freeze("nats")
    asked.append(request("mei"))
    answered = await in_time(3, lambda: ask(mei, asked[-1]))  # a second, and room for a busy machine
    assert answered is None, "a 503 that says when to come again"
    assert (await mei.get("/assets")).status_code == 200, "reading goes on"
    system.thaw("nats")
    await ask_until_answered(mei, asked[-1])
    await settled(witness, asked)


@pytest.mark.fault("H4")
async def test_a_frozen_postgres_stops_reading_and_nothing_else(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    await system.freeze("postgres")
    asked.append(request("mei"))
    job = await ask_until_answered(mei, asked[-1])
    await happened(witness, "completed", job=job)
    answer = await mei.get("/assets")
    assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
    system.thaw("postgres")

    async def read() -> bool:
        return (await mei.get("/assets")).status_code == 200

    await wait_until(read, 60, "the tables are read again")
    await settled(witness, asked)


@pytest.mark.fault("C2")
async def test_a_second_word_to_stop_is_obeyed_at_once(
    system: System, witness: Witness, mei: httpx.AsyncClient, asked: list[Asked]
) -> None:
    await system.faults(frozen=True)  # what it has in hand it cannot finish
    asked.append(request("mei"))
    job = await ask_until_answered(mei, asked[-1])
    await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 1, 60, "it is drawn")
    pid = (await happened(witness, "started", job=job)).data["worker"].split("-")[-2]
    workers = [name for name in ("generation", "generation2") if name in system.members]
    [name] = [name for name in workers if str(system.process(name).pid) == pid]
    process = system.process(name)
    system.terminate(name)
    await wait_until(lambda: "stopping" in _log(system, name), 30, "it was told")
    process.send(signal.SIGTERM)
    await wait_until(lambda: process.exit_status is not None, 30, "it has ended")
    assert process.exit_status == 130
    await system.faults(frozen=False)
    system.start(name)
    await settled(witness, asked, timeout=90)


def _log(system: System, name: str) -> str:
    return (system.root / "log" / f"{name}.log").read_text()
