"""`kill -9` of each part at a random moment of a working day: every 202 still ends once, nothing is twice."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from acceptance.evidence import Witness
from acceptance.players import Crowd, scaled
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import System, running, say

VICTIMS = ("generation", "dispatcher", "projector", "api", "nats", "postgres", "sim")
SEED = int(os.environ.get("FORGE_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)


@pytest.fixture(scope="module")
async def system(module_root: Path) -> AsyncIterator[System]:
    """One system for all tests here: whoever was killed before has to be as good as new."""
    async with running(module_root, render_ms="50-200", apis=2) as system:
        yield system


@pytest.fixture(scope="module")
async def witness(system: System) -> AsyncIterator[Witness]:
    async with watching(system) as witness:
        yield witness


@pytest.fixture(scope="module")
def everything_asked() -> list[Crowd]:
    """What all tests so far have asked for: it must stay as it is, too."""
    return []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", VICTIMS)
async def test_a_killed_part_loses_and_doubles_nothing(
    victim: str, system: System, witness: Witness, everything_asked: list[Crowd]
) -> None:
    dice = random.Random(f"{SEED} {victim}")
    say(f"FORGE_TEST_SEED={SEED}")
    crowd = Crowd(system, scaled(30), users=6, dice=dice, pause=0.4)
    everything_asked.append(crowd)
    done = Counter(ends(await witness.everything()))["completed"]
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.play())
        await happened(witness, "completed", done + dice.randrange(2, scaled(15)))
        await _killed_and_back(system, victim, dice)
    await _judged(system, witness, everything_asked)


@pytest.mark.timeout(300)
async def test_all_parts_killed_in_turn(
    system: System, witness: Witness, everything_asked: list[Crowd]
) -> None:
    dice = random.Random(f"{SEED} all")
    say(f"FORGE_TEST_SEED={SEED}")
    crowd = Crowd(system, scaled(60), users=10, dice=dice, pause=1.0)
    everything_asked.append(crowd)
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.play())
        for victim in dice.sample(VICTIMS, k=len(VICTIMS)):
            await asyncio.sleep(dice.uniform(0.2, 1.5))
            await _killed_and_back(system, victim, dice)
    await _judged(system, witness, everything_asked)


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
