"""A process dies at each step of its work, and what it was about is neither lost nor done twice."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from acceptance.evidence import Witness
from acceptance.failpoints import PLACES, Failpoints
from acceptance.players import SCALE, SEED, Crowd, scaled
from acceptance.settling import ends, settled
from acceptance.system import System, running, say
from waiting import wait_until

FEW = (
    "worker: before the POST",
    "worker: after the POST",
    "worker: before the rename",
    "worker: before the conclusion",
    "worker: after the conclusion",
    "worker: before the ack",
)
"""Each costs a lease of 10 s; the others come with `FORGE_TEST_SCALE`."""
API = tuple(name for name in PLACES if name.startswith("api"))
WORKER = tuple(name for name in PLACES if name.startswith("worker")) if SCALE > 1 else FEW
FOLLOWERS = tuple(name for name in PLACES if name.startswith(("dispatcher", "projector")))


@pytest.fixture(scope="module")
def failpoints(module_root: Path) -> Failpoints:
    return Failpoints(module_root / "armed")


@pytest.fixture(scope="module")
async def system(module_root: Path, failpoints: Failpoints) -> AsyncIterator[System]:
    async with running(module_root, render_ms="50-200", apis=2, **failpoints.environ) as system:
        system.start("generation2", "generation3", "generation4")
        yield system


@pytest.mark.timeout(300)
@pytest.mark.fault("K1", "K2", "K3", "K4")
@pytest.mark.parametrize(
    "places",
    [
        pytest.param(API, id="api"),
        pytest.param(WORKER, id="worker"),
        pytest.param(FOLLOWERS, id="followers"),
    ],
)
async def test_killed_at_every_step_nothing_is_lost_or_twice(
    places: tuple[str, ...], system: System, witness: Witness, failpoints: Failpoints, crowds: list[Crowd]
) -> None:
    await _judged(places, "kill", system, witness, failpoints, crowds)


@pytest.mark.fault("D4")
async def test_refused_by_the_volume_at_every_step_nothing_is_lost_or_half(
    system: System, witness: Witness, failpoints: Failpoints, crowds: list[Crowd]
) -> None:
    places = (
        "worker: before the fetch",
        "worker: before the store",
        "worker: before the rename",
        "worker: before the sync",
    )
    await _judged(places, "error", system, witness, failpoints, crowds)


async def _judged(
    places: Sequence[str],
    action: str,
    system: System,
    witness: Witness,
    failpoints: Failpoints,
    crowds: list[Crowd],
) -> None:
    say(f"FORGE_TEST_SEED={SEED}")
    dice = random.Random(f"{SEED} {places}")
    crowds.append(Crowd(system, max(15, scaled(15)), users=5, dice=dice, pause=0.2))
    failpoints.arm(*places, action=action)
    await crowds[-1].play()
    await wait_until(lambda: not failpoints.waiting(), 100, f"all of {places} were come by")
    evidence = await settled(witness, [one for crowd in crowds for one in crowd.asked], timeout=120)
    say(f"{Counter(ends(evidence))}; {failpoints.taken()}; {system.deaths}")
    accepted = {id_ for one in crowds[-1].asked for id_ in one.answers}
    assert set(ends(evidence, accepted)) == {"completed"}
