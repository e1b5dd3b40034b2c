"""Slow, broken, silent and lying connections between forge and what it needs: it goes on by itself."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from acceptance.evidence import Witness
from acceptance.players import SEED, Crowd, ask, ask_until_answered, in_time, request, scaled
from acceptance.settling import ends, settled
from acceptance.system import System, running, say
from waiting import wait_until


@pytest.fixture(scope="module")
async def system(module_root: Path) -> AsyncIterator[System]:
    async with running(module_root, render_ms="50-200", linked=True) as system:
        yield system


@pytest.mark.timeout(240)
@pytest.mark.fault("N1", "N2")
@pytest.mark.parametrize("server", ["nats", "postgres", "sim"])
async def test_a_spoilt_connection_loses_and_doubles_nothing(
    server: str, system: System, witness: Witness, crowds: list[Crowd]
) -> None:
    say(f"FORGE_TEST_SEED={SEED}")
    crowds.append(Crowd(system, max(12, scaled(12)), users=4, dice=random.Random(SEED), pause=0.4))
    async with asyncio.TaskGroup() as group:
        group.create_task(crowds[-1].play())
        group.create_task(_spoil(system, server, random.Random(f"{SEED} {server}")))
    evidence = await settled(witness, [one for crowd in crowds for one in crowd.asked], timeout=90)
    say(f"{Counter(ends(evidence))}; ended on their own: {system.deaths}")
    accepted = {id_ for one in crowds[-1].asked for id_ in one.answers}
    assert set(ends(evidence, accepted)) == {"completed"}


async def _spoil(system: System, server: str, dice: random.Random) -> None:
    link = system.links[server]
    link.delay = 0.02
    for _ in range(3):
        await asyncio.sleep(dice.uniform(0.1, 0.6))
        link.reset()
    link.corrupt = 2
    await asyncio.sleep(0.5)
    link.hole()
    await asyncio.sleep(2)
    link.heal()


@pytest.mark.fault("N2")
async def test_a_black_hole_is_told_in_time_and_heals(
    system: System, witness: Witness, crowds: list[Crowd]
) -> None:
    asked = request("mei")
    async with system.client("mei") as mei:
        system.links["nats"].hole()
        answered = await in_time(3, lambda: ask(mei, asked))  # a second, and room for a busy machine
        assert answered is None, "a 503 that says when to come again"
        system.links["nats"].heal()
        await ask_until_answered(mei, asked)

        system.links["postgres"].hole()
        answer = await in_time(8, lambda: mei.get("/assets"))
        assert (answer.status_code, "retry-after" in answer.headers) == (503, True), answer.text
        system.links["postgres"].heal()

        async def read() -> bool:
            return (await mei.get("/assets")).status_code == 200

        await wait_until(read, 60, "the tables are read again")
    await settled(witness, [*(one for crowd in crowds for one in crowd.asked), asked])
