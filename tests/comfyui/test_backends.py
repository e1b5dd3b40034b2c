"""Which ComfyUI a prompt goes to: leaving a server that does not answer or execute, and coming back."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from uuid import UUID, uuid4

import pytest

from forge.comfyui.backends import Backends, Quarantine, Standing, after_evidence, after_probe
from forge.comfyui.client import Comfy
from forge.comfyui.patience import Patience
from forge.comfyui.protocol import Health, Sighting
from forge.comfyui.simulator import Faults, Simulator
from forge.errors import BackendWedged
from waiting import wait_until

HURRY = Patience(
    connect=5.0,
    read=10.0,
    poll=(0.1, 0.2),
    poll_deaf=(0.02, 0.05),
    poll_first=0.005,
    settle=0.02,
    unreachable=0.4,
    cancel=0.3,
    reconnect=(0.01, 0.05),
    health_interval=0.03,
    health_retry=0.02,
    health_timeout=5.0,
)

GOOD = Health(True)
BAD = Health(False, detail="connection refused")


async def submitted(comfy: Comfy) -> UUID:
    prompt_id = uuid4()
    image = {"width": 64, "height": 64, "batch_size": 1, "color": 1}
    save = {"images": ["1", 0], "filename_prefix": f"forge/{prompt_id}/img"}
    graph: dict[str, Any] = {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "SaveImage", "inputs": save},
    }
    await comfy.submit(prompt_id, graph, outputs=["2"])
    return prompt_id


def chosen(backends: Backends) -> str:
    found = backends.choose()
    return found[0].url if found is not None else ""


async def test_a_server_that_is_not_there_at_the_start_is_told_of(
    nowhere: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Backends([nowhere], HURRY) as backends:
        assert chosen(backends) == ""
    [said] = [record.getMessage() for record in caplog.records if record.name == "forge.comfyui.backends"]
    assert said.startswith(f"ComfyUI {nowhere}: unreachable ({nowhere}: [Errno ")


# The rules


def standing_after(*probes: Health, start: Standing) -> Standing:
    for health in probes:
        start = after_probe(start, health, Patience())
    return start


def test_one_lost_probe_changes_nothing_two_do() -> None:
    healthy = Standing(healthy=True)
    assert standing_after(BAD, start=healthy).healthy
    assert standing_after(BAD, GOOD, BAD, start=healthy).healthy
    left = standing_after(BAD, BAD, start=healthy)
    assert not left.healthy
    assert "connection refused" in left.reason


def test_one_good_answer_is_not_a_return_two_are() -> None:
    left = Standing(healthy=False, failures=9)
    assert not standing_after(GOOD, start=left).healthy
    assert not standing_after(GOOD, BAD, GOOD, start=left).healthy
    assert standing_after(GOOD, GOOD, start=left).healthy


def test_the_very_first_answer_is_enough() -> None:
    assert after_probe(Standing(), GOOD, Patience(), first=True).healthy


def test_a_quarantine_ends_by_proof_only() -> None:
    begun = Quarantine("hung", until=100.0)
    noted = after_evidence(begun, queue_remaining=2, running=("a",), now=1.0)
    assert noted is not None
    assert after_evidence(noted, queue_remaining=2, running=("a",), now=99.0) == noted
    assert after_evidence(noted, queue_remaining=2, running=(), now=99.0) == noted
    assert after_evidence(noted, queue_remaining=2, running=("b",), now=2.0) is None, "it executes"
    assert after_evidence(noted, queue_remaining=0, running=(), now=2.0) is None, "restarted or drained"
    assert after_evidence(noted, queue_remaining=2, running=("a",), now=101.0) is None, "another chance"


# On servers


async def test_the_preferred_server_is_left_when_it_does_not_answer_and_used_again_when_it_does() -> None:
    async with (
        Simulator() as first,
        Simulator() as second,
        Backends([first.url, second.url], HURRY) as backends,
    ):
        comfy, reason = await backends.available()
        assert (comfy.url, reason) == (first.url, "preferred")
        await first.leave()
        await wait_until(lambda: chosen(backends) == second.url, what="the fallback is chosen")
        comfy, reason = await backends.available()
        assert reason.startswith(f"fallback: {first.url} unreachable (")
        assert re.search(r", since \d+ s$", reason)
        assert await comfy.wait(await submitted(comfy), timeout=60)
        await first.come_back()
        await wait_until(lambda: chosen(backends) == first.url, what="back to the preferred")
        assert await comfy.look(uuid4()) is Sighting.ABSENT, "the other client stays open"


async def test_a_server_that_was_never_there_does_not_matter(nowhere: str) -> None:
    async with Simulator() as second, Backends([nowhere, second.url], HURRY) as backends:
        comfy, reason = await backends.available()
        assert comfy.url == second.url
        assert nowhere in reason
        preferred, fallback = backends.status()
        assert (preferred.healthy, preferred.preferred) == (False, True)
        assert "unreachable" in preferred.reason
        assert (fallback.healthy, fallback.preferred, fallback.reason) == (True, False, "")
        assert (fallback.version, fallback.queue_remaining) == ("0.27.0", 0)


async def test_available_waits_for_a_server_to_come() -> None:
    async with Simulator() as simulator:
        await simulator.leave()
        async with Backends([simulator.url], HURRY) as backends:
            assert backends.choose() is None
            coming = asyncio.create_task(backends.available())
            await simulator.come_back()
            comfy, reason = await asyncio.wait_for(coming, 30)
            assert (comfy.url, reason) == (simulator.url, "preferred")


async def test_waiting_for_a_server_can_be_given_up(nowhere: str) -> None:
    async with Backends([nowhere], HURRY) as backends:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await backends.available()


async def test_a_server_is_found_by_name_whatever_its_health(nowhere: str) -> None:
    async with Backends([nowhere], HURRY) as backends:
        found = backends.named(f"{nowhere}/")
        assert found is not None
        assert found.url == nowhere
        assert backends.named("http://elsewhere") is None
        backends.quarantine("http://elsewhere", "nobody")


async def test_a_wedged_server_is_left_and_its_waits_end() -> None:
    async with (
        Simulator() as first,
        Simulator() as second,
        Backends([first.url, second.url], HURRY) as backends,
    ):
        first.faults = Faults(frozen=True)
        comfy, _ = await backends.available()
        stuck, behind = await submitted(comfy), await submitted(comfy)
        wait = asyncio.create_task(comfy.wait(behind, timeout=60))
        with pytest.raises(BackendWedged):
            await comfy.cancel(stuck)
        backends.quarantine(first.url, "a cancelled prompt would not go")
        with pytest.raises(BackendWedged, match="would not go"):
            await wait
        _, reason = await backends.available()
        assert reason.startswith(f"fallback: {first.url} a cancelled prompt would not go")
        assert not backends.status()[0].healthy

        await first.forget()
        first.faults = Faults()
        await wait_until(lambda: chosen(backends) == first.url, what="a restart ends the quarantine")


async def test_a_server_that_executes_again_is_used_again() -> None:
    async with Simulator() as simulator, Backends([simulator.url], HURRY) as backends:
        simulator.faults = Faults(frozen=True)
        comfy, _ = await backends.available()
        await submitted(comfy)
        await submitted(comfy)
        backends.quarantine(simulator.url, "hung")
        assert backends.choose() is None
        simulator.faults = Faults()
        async with asyncio.timeout(30):
            comfy, _ = await backends.available()
        assert await comfy.wait(await submitted(comfy), timeout=60)


async def test_who_waits_hears_of_a_server_that_is_left_and_back_while_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Simulator() as simulator, Backends([simulator.url], HURRY) as backends:
        asked, answer, health = asyncio.Event(), asyncio.Event(), Comfy.health

        async def late(comfy: Comfy) -> Health:
            asked.set()
            await answer.wait()
            return await health(comfy)

        monkeypatch.setattr(Comfy, "health", late)
        await asyncio.wait_for(asked.wait(), 30)
        backends.quarantine(simulator.url, "hung")
        waiting = asyncio.create_task(backends.available())
        await asyncio.sleep(0)
        assert backends.choose() is None
        answer.set()  # its queue is empty, which ends the quarantine
        comfy, _ = await asyncio.wait_for(waiting, 30)
        assert comfy.url == simulator.url


async def test_leaving_ends_every_watch(nowhere: str) -> None:
    before = asyncio.all_tasks()
    async with Backends([nowhere, nowhere], HURRY):
        assert len(asyncio.all_tasks() - before) >= 4
    assert asyncio.all_tasks() <= before


def test_no_server_at_all_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Backends([])
