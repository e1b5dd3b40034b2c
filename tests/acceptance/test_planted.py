"""One scene with forge as it is, and with a bug planted: the first is faultless, the second found out."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from acceptance.evidence import Witness
from acceptance.failpoints import PLANTED, Failpoints
from acceptance.players import ask_until_answered, request
from acceptance.settling import happened, settled, watching
from acceptance.system import System, running
from waiting import wait_until

Played = tuple[System, Witness, Failpoints]
Scene = Callable[[System, Witness, Failpoints], Awaitable[None]]

CONCLUDING = "worker: before the conclusion"


async def late_result(system: System, witness: Witness, failpoints: Failpoints) -> None:
    """A worker freezes with the picture in its hands, another is given its order, and it wakes up after."""
    await system.order("sim", "render", {"least_ms": 50})
    _start_another(system)
    failpoints.arm(CONCLUDING, action="stop")
    asked = request("mei")
    async with system.client("mei") as mei:
        job = await ask_until_answered(mei, asked)
    pid = await wait_until(lambda: failpoints.taken().get(CONCLUDING), 60, "it has the picture")
    [late] = [name for name in ("generation", "generation2") if system.process(name).pid == pid]
    await witness.purge_orders()
    await happened(witness, "completed", job=job)
    system.thaw(late)
    system.terminate(late)  # an ended worker has said all it had to say
    await wait_until(lambda: system.process(late).exit_status is not None, 60, "the late one has ended")
    system.start(late)
    await settled(witness, [asked])


async def orders_gone(system: System, witness: Witness, failpoints: Failpoints) -> None:
    """The orders of three that are being drawn are gone, others wait, and a worker has its hands free."""
    await system.order("sim", "render", {"least_ms": 50})
    await system.faults(frozen=True)
    asked = [request("mei") for _ in range(6)]
    async with system.client("mei") as mei:
        jobs = [await ask_until_answered(mei, one) for one in asked]
    await wait_until(lambda: _present(witness) == 3, 60, "three prompts")
    _start_another(system)
    await system.working("generation2")
    await witness.purge_orders()

    async def looked_for() -> bool:
        told = await witness.jobs()
        adopted = [job for job in jobs if any(e.type == "forge.job.adopted.v1" for e in told[job])]
        return len(adopted) == 3 or _present(witness) > 3

    await wait_until(looked_for, 60, "all three are looked for, or more are there")
    await system.faults(frozen=False)
    await settled(witness, asked)


async def killed_before_the_ack(system: System, witness: Witness, failpoints: Failpoints) -> None:
    """A worker dies with the conclusion written."""
    await system.order("sim", "render", {"least_ms": 50})
    failpoints.arm("worker: after the conclusion")
    asked = request("mei")
    async with system.client("mei") as mei:
        await ask_until_answered(mei, asked)
    await settled(witness, [asked])


async def three_in_back_off(system: System, witness: Witness, failpoints: Failpoints) -> None:
    """Three attempts fail, and a fourth job is asked for."""
    await system.order("sim", "render", {"least_ms": 50})
    await system.faults(fail_next=3)
    before = _ended(witness)
    asked = [request("mei") for _ in range(3)]
    async with system.client("mei") as mei:
        for one in asked:
            await ask_until_answered(mei, one)
        await wait_until(lambda: _ended(witness) >= before + 3, 60, "three failed")
        asked.append(request("mei"))
        await ask_until_answered(mei, asked[-1])
    await happened(witness, "completed", job=asked[-1].answers[0], timeout=10)
    await settled(witness, asked)


SCENES: dict[str, tuple[Scene, str]] = {
    "no fence": (late_result, "ended 2 times"),
    "place freed with the order": (orders_gone, "prompts at once"),
    "ack before store": (killed_before_the_ack, r"has no (file|row)"),
    "delayed nak": (three_in_back_off, "job.completed"),
}


@pytest.fixture(scope="module")
async def sound(module_root: Path) -> AsyncIterator[Played]:
    """forge as it is, for every scene."""
    async with playing(module_root) as played:
        yield played


@pytest.mark.timeout(240)
@pytest.mark.parametrize("bug", SCENES)
async def test_a_planted_bug_is_found(bug: str, sound: Played, root: Path) -> None:
    scene, found = SCENES[bug]
    await scene(*sound)
    async with playing(root, planted=bug) as spoilt:
        with pytest.raises(AssertionError, match=found):
            await scene(*spoilt)


@contextlib.asynccontextmanager
async def playing(root: Path, planted: str = "") -> AsyncIterator[Played]:
    failpoints = Failpoints(root / "armed")
    more = failpoints.environ | ({PLANTED: planted} if planted else {})
    async with running(root, render_ms="50-100", **more) as system, watching(system) as witness:
        yield system, witness, failpoints


def _start_another(system: System) -> None:
    """A worker with free hands, unless an earlier scene has started it."""
    if "generation2" not in system.members:
        system.start("generation2")


def _present(witness: Witness) -> int:
    return int(witness.simulator("sim")[-1]["present"])


def _ended(witness: Witness) -> int:
    return sum(line["event"] == "ended" for line in witness.simulator("sim"))
