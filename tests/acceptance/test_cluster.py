"""Three servers hold the log: any of them may leave or be killed in the middle of a run; nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import nats
import nats.errors
import pytest

from acceptance.balancing import Load, balanced
from acceptance.checker import Asked
from acceptance.cluster import ONCE, SIZE, Node, cluster, clustered, led_by_another, state, whole
from acceptance.evidence import Witness
from acceptance.players import SEED, Crowd, ask_until_answered, request, scaled
from acceptance.settling import ends, happened, settled
from acceptance.system import System, say
from forge import bootstrap
from forge.settings import load
from waiting import wait_until

USERS = 6


@pytest.fixture(scope="module")
async def three(module_root: Path) -> AsyncIterator[tuple[System, list[Node]]]:
    async with clustered(module_root) as found:
        yield found


@pytest.fixture(scope="module")
def system(three: tuple[System, list[Node]]) -> System:
    return three[0]


@pytest.fixture(scope="module")
def nodes(three: tuple[System, list[Node]]) -> list[Node]:
    return three[1]


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    """Whatever was asked for in any of these tests."""
    return []


@pytest.mark.timeout(240)
async def test_the_leader_of_the_log_is_killed_and_nothing_is_lost(
    system: System, nodes: list[Node], witness: Witness, asked: list[Asked]
) -> None:
    dice = random.Random(SEED)
    say(f"FORGE_TEST_SEED={SEED}")
    crowd = Crowd(system, scaled(40), users=USERS, dice=dice, pause=0.3)
    asked += crowd.asked
    async with asyncio.TaskGroup() as group:
        group.create_task(crowd.play())
        await happened(witness, "completed", times=dice.randrange(3, 10))
        leader = (await wait_until(lambda: state(nodes), 60, "a server leads the log"))["leader"]
        (killed,) = [node for node in nodes if node.name == leader]
        if killed is system.nats:
            system.down.add("nats")
        killed.kill()
        await wait_until(lambda: led_by_another(nodes, leader), 60, "another server leads the log", 0.2)
        asked += await two_go_on(system)
    killed.launch()
    system.down.discard("nats")
    evidence = await settled(witness, asked, timeout=120)
    assert set(ends(evidence)) == {"completed"}
    await wait_until(lambda: whole(nodes), 60, "all three have everything again", 0.2)


@pytest.mark.fault("C3")
@pytest.mark.timeout(240)
async def test_each_server_leaves_and_comes_back_under_load_and_nothing_is_lost(
    system: System, nodes: list[Node], witness: Witness, asked: list[Asked]
) -> None:
    await system.order("sim", "render", {"least_ms": 5, "most_ms": 20})
    async with balanced(system) as (client, balancer):
        load = Load(client, asked, scaled(20))
        async with asyncio.TaskGroup() as players:
            for nth in range(USERS):
                players.create_task(load.player(f"user-{nth}"))
            for node in nodes:
                before = balancer.answers.copy()
                await restarted(system, node)
                await load.goes_on(USERS, node.name)
                say(f"{node.name}: {balancer.answers - before}")
            load.enough.set()
    evidence = await settled(witness, asked, timeout=120)
    assert set(ends(evidence)) == {"completed"}
    assert balancer.broken == []
    assert balancer.answers.keys() <= {200, 202, 503}
    assert system.deaths == []


@pytest.mark.timeout(240)
async def test_who_starts_before_a_server_leads_waits_for_it(root: Path) -> None:
    nodes = cluster(root)
    more = {"FORGE_NATS_URL": ",".join(node.url for node in nodes), "FORGE_NATS_REPLICAS": str(SIZE)}
    system = System(root, render_ms="50", nats=nodes[0], **more)
    try:
        system.start("nats", "postgres")
        system.nats.wait_ready()
        system.postgres.wait_ready()
        await wait_until(lambda: says_that_none_leads(nodes[0]), 60, "alone it says so, after ten seconds")
        early = ("api", "housekeeping")
        system.start(*early)
        for name in early:
            await wait_until(lambda name=name: "no server leads" in said(system, name), 60, f"{name} waits")
        for node in nodes[1:]:
            node.launch()
        await bootstrap.setup(load(system.environ("api")))
        await wait_until(lambda: '"working"' in said(system, "housekeeping"), 60, "the worker works")
        async with httpx.AsyncClient(base_url=system.url("api")) as asking:

            async def ready() -> bool:
                said(system, "api")
                with contextlib.suppress(httpx.TransportError):
                    return (await asking.get("/readyz")).status_code == 200
                return False

            await wait_until(ready, 60, "the API serves", 0.1)
    finally:
        for node in nodes[1:]:
            node.kill()
        system.stop()


async def says_that_none_leads(node: Node) -> bool:
    """Before that it says nothing."""
    nc = await nats.connect(node.url, **ONCE)
    try:
        answer = await nc.request("$JS.API.STREAM.INFO.FORGE_EVENTS", b"", timeout=2)
    except nats.errors.TimeoutError:
        return False
    finally:
        await nc.close()
    return bool(json.loads(answer.data)["error"]["err_code"] == 10008)


def said(system: System, name: str) -> str:
    """What a process that has not ended has said."""
    process = system.process(name)
    assert process.running, f"{name} ended with {process.exit_status}: {process.last_words()}"
    return process.log.read_text()


async def restarted(system: System, node: Node) -> None:
    """As an upgrade does it: it hands over and leaves, and is started again; the next one's turn comes when
    this one says that it is well."""
    process = node.process
    assert process is not None
    if node is system.nats:
        system.down.add("nats")
    process.send(signal.SIGUSR2)
    await wait_until(lambda: not process.running, 60, f"{node.name} has left")
    assert process.exit_status == 0, process.last_words()
    node.stop()
    node.launch()
    system.down.discard("nats")
    await asyncio.to_thread(node.wait_ready)
    async with httpx.AsyncClient(base_url=node.monitoring_url) as asking:

        async def healthy() -> bool:
            return (await asking.get("/healthz")).status_code == 200

        await wait_until(healthy, 60, f"{node.name} has everything again", 0.1)


async def two_go_on(system: System) -> list[Asked]:
    """More is asked for and drawn; told by the tables, as whoever looks on may have lost its own server."""
    asked = [request("late") for _ in range(4)]
    async with system.client("late") as client:
        jobs = [await ask_until_answered(client, one) for one in asked]

        async def drawn() -> bool:
            answers = [await client.get(f"/jobs/{job}") for job in jobs]
            return all(a.status_code == 200 and a.json()["status"] == "completed" for a in answers)

        await wait_until(drawn, 60, "two servers go on", 0.2)
    return asked
