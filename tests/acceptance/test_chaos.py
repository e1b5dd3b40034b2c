"""Everything at once: two of each worker, parts killed or frozen at random, ComfyUI misbehaving, players who
change their minds. Then it heals, and every invariant holds. `FORGE_TEST_SCALE` makes it longer."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest

from acceptance.players import SCALE, SEED, Crowd, scaled
from acceptance.settling import ends, settled, watching
from acceptance.system import WORKERS, System, running, say

PAIRS = tuple(f"{worker}2" for worker in WORKERS)
VICTIMS = ("nats", "postgres", "sim", "api", "api2", *WORKERS, *PAIRS)
ROUND_SECONDS = 8.0
FAULTS = (
    "history_delay_ms",
    "answer_delay_ms",
    "slow_http_ms",
    "refuse_next",
    "queue_and_refuse_next",
    "hang_up_next",
    "fail_next",
    "empty_outputs_next",
)


@pytest.mark.timeout(180 * max(1, SCALE))
@pytest.mark.fault("K1", "K2", "K3", "K4", "K5", "K6", "K7", "H1", "H2", "H3", "H4", "H5")
async def test_whatever_happens_every_request_ends_once(root: Path) -> None:
    dice = random.Random(SEED)
    say(f"FORGE_TEST_SEED={SEED}")
    workers = (*WORKERS, *PAIRS)
    async with (
        running(root, render_ms="50-200", apis=2, workers=workers) as system,
        watching(system) as witness,
    ):
        crowd = Crowd(system, scaled(60), users=12, dice=dice, pause=0.8, fickle=0.2)
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.play())
            for round_ in range(scaled(1)):
                for victim in dice.sample(VICTIMS, k=6):
                    group.create_task(_struck(system, victim, round_ * ROUND_SECONDS, dice))
                group.create_task(_confused(system, round_ * ROUND_SECONDS, dice))
        await system.ready()
        await system.faults(**dict.fromkeys(FAULTS, 0))
        evidence = await settled(witness, crowd.asked, timeout=150)
        say(f"{Counter(ends(evidence))}; ended on their own: {system.deaths}")


async def _struck(system: System, victim: str, earliest: float, dice: random.Random) -> None:
    """Killed, or stopped like a machine that swaps, for some part of a round."""
    begin, away, freezes = dice.uniform(0, 3), dice.uniform(0, 4), dice.random() < 0.3
    await asyncio.sleep(earliest + begin)
    say(f"{'stop' if freezes else 'kill -9'} {victim}, back after {away:.1f} s")
    if freezes:
        system.freeze(victim)
        await asyncio.sleep(away)
        system.thaw(victim)
    else:
        system.kill(victim)
        await asyncio.sleep(away)
        system.start(victim)


async def _confused(system: System, earliest: float, dice: random.Random) -> None:
    """One thing that a ComfyUI was seen to do wrong; slow ones last until the round is over."""
    await asyncio.sleep(earliest + dice.uniform(0, ROUND_SECONDS / 2))
    fault = dice.choice(FAULTS)
    amount = dice.randint(50, 1500) if fault.endswith("_ms") else dice.randint(1, 2)
    say(f"{fault}={amount}")
    with contextlib.suppress(httpx.TransportError):  # it may be dead at the moment
        await system.faults(**{fault: amount})
        if fault.endswith("_ms"):
            await asyncio.sleep(ROUND_SECONDS / 2)
            await system.faults(**{fault: 0})
