"""`kill -9` of each part at a random moment of a working day: every 202 still ends once, nothing is twice."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from acceptance.evidence import Witness
from acceptance.failpoints import Failpoints
from acceptance.players import SEED, Crowd, ask, ask_until_answered, in_time, request, scaled
from acceptance.settling import ends, happened, settled
from acceptance.system import System, running, say
from waiting import wait_until

VICTIMS = ("generation", "dispatcher", "projector", "api", "nats", "postgres", "sim")


@pytest.fixture(scope="module")
def failpoints(module_root: Path) -> Failpoints:
    return Failpoints(module_root / "armed")


@pytest.fixture(scope="module")
async def system(module_root: Path, failpoints: Failpoints) -> AsyncIterator[System]:
    """One system for all tests here: whoever was killed before has to be as good as new."""
    async with running(module_root, render_ms="50-200", apis=2, **failpoints.environ) as system:
        yield system


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.fault("K1", "K2", "K3", "K4", "K5", "K6", "K7")
async def test_a_killed_part_loses_and_doubles_nothing(
    victim: str, system: System, witness: Witness, crowds: list[Crowd]
) -> None:
    dice = random.Random(f"{SEED} {victim}")
    say(f"FORGE_TEST_SEED={SEED}")
    crowd = Crowd(system, scaled(20), users=5, dice=dice, pause=0.3)
    crowds.append(crowd)
    done = Counter(ends(await witness.everything()))["completed"]
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.play())
        await happened(witness, "completed", done + dice.randrange(2, scaled(10)))
        await _killed_and_back(system, victim, dice)
    await _judged(system, witness, crowds)


@pytest.mark.fault("K2")
async def test_a_half_stored_picture_of_a_killed_worker_goes(
    system: System, witness: Witness, crowds: list[Crowd], failpoints: Failpoints
) -> None:
    async with system.client("mei") as mei:
        failpoints.arm("worker: before the store", action="stop")
        asked = request("mei", params={"width": 1024, "height": 1024})
        id_ = await ask_until_answered(mei, asked)
        await wait_until(failpoints.taken, 60, "it stores a picture")
        assert witness.leftovers(), "stopped in the act"
        system.kill("generation")
        system.start("generation")
        await happened(witness, "adopted", job=id_)
    await settled(witness, [*(one for crowd in crowds for one in crowd.asked), asked])


@pytest.mark.fault("B7")
async def test_orders_that_vanish_are_given_again(
    system: System, witness: Witness, crowds: list[Crowd]
) -> None:
    await system.faults(frozen=True)  # all three are there until somebody has looked for them
    async with system.client("mei") as mei:
        asked = [request("mei") for _ in range(8)]
        jobs = [await ask_until_answered(mei, one) for one in asked]
        await wait_until(lambda: witness.simulator("sim")[-1]["present"] == 3, 60, "three prompts")
        system.start("generation2")
        await system.working("generation2")  # with hands free for a fourth
        await witness.purge_orders()
        system.kill("generation")
        system.start("generation")
        for job in jobs[:3]:
            await happened(witness, "adopted", job=job)
        await system.faults(frozen=False)
        await happened(witness, "completed", job=jobs[-1])
    await settled(witness, [*(one for crowd in crowds for one in crowd.asked), *asked])


@pytest.mark.fault("K6")
async def test_requests_are_accepted_while_postgres_is_away(
    system: System, witness: Witness, crowds: list[Crowd]
) -> None:
    async with system.client("mei") as mei:
        system.kill("postgres")
        asked = [request("mei") for _ in range(3)]
        for one in asked:
            await ask_until_answered(mei, one)  # without a table
        drawn = [await happened(witness, "completed", job=one.answers[0]) for one in asked]
        for path in ("/queue", "/assets", f"/jobs/{asked[0].answers[0]}"):
            answer = await mei.get(path)
            assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
        system.start("postgres")
        newest = max(event.seq for event in drawn)
        await wait_until(lambda: _status(mei, f"/assets?min_seq={newest}", 200), 60, "the tables catch up")
    await settled(witness, [*(one for crowd in crowds for one in crowd.asked), *asked])


@pytest.mark.fault("K5")
async def test_pictures_are_readable_while_nats_is_away(
    system: System, witness: Witness, crowds: list[Crowd]
) -> None:
    async with system.client("mei") as mei:
        asked = request("mei")
        id_ = await ask_until_answered(mei, asked)
        seq = (await happened(witness, "completed", job=id_)).seq
        await mei.get("/assets", params={"min_seq": seq})
        system.kill("nats")
        late = request("mei")
        assert await in_time(3, lambda: ask(mei, late)) is None, "a second, and room for a busy machine"
        listed = (await mei.get("/assets")).json()["items"]
        assert (await mei.get(f"/assets/{listed[0]['id']}/file")).status_code == 200
        system.start("nats")
        await ask_until_answered(mei, late)
    await settled(witness, [*(one for crowd in crowds for one in crowd.asked), asked, late])


async def _status(client: httpx.AsyncClient, path: str, wanted: int) -> bool:
    return (await client.get(path)).status_code == wanted


async def _killed_and_back(system: System, victim: str, dice: random.Random) -> None:
    await asyncio.sleep(dice.uniform(0, 0.3))
    away = dice.choice((0.0, 0.3, 2.0))
    say(f"kill -9 {victim}, back after {away} s")
    system.kill(victim)
    await asyncio.sleep(away)
    system.start(victim)


async def _judged(system: System, witness: Witness, crowds: list[Crowd]) -> None:
    asked = [one for crowd in crowds for one in crowd.asked]
    evidence = await settled(witness, asked, timeout=120)
    say(f"{Counter(ends(evidence))}; ended on their own: {system.deaths}")
    accepted = {id_ for one in asked for id_ in one.answers}
    assert set(ends(evidence, accepted)) == {"completed"}
