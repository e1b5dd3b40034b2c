"""Three servers hold the log: the one that leads is killed in the middle of a run, and nothing is lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import nats
import nats.errors
import pytest

from acceptance.players import SEED, Crowd, scaled
from acceptance.settling import ends, happened, settled, watching
from acceptance.system import System, free_port, running, say
from forge.embedded import EmbeddedNats
from forge.embedded.nats import CONFIG
from waiting import wait_until


async def _nothing(_: Exception) -> None:
    pass


SIZE = 3
ONCE: dict[str, Any] = {
    "max_reconnect_attempts": 1,
    "reconnect_time_wait": 0.05,
    "connect_timeout": 1,
    "error_cb": _nothing,
}
"""A server that is not there is told at once: without a number nats-py goes on trying for two minutes."""


class Node(EmbeddedNats):
    """One of the servers, by `nats/cluster.conf`; all of them know the same users."""

    def __init__(self, root: Path, name: str, variables: Mapping[str, str]) -> None:
        super().__init__(
            root / name,
            free_port(),
            log=root / "log" / f"{name}.log",
            config=CONFIG.with_name("cluster.conf"),
            anybody=True,
            variables={"FORGE_NATS_NAME": name, **variables},
        )
        self.name, self.passwords = name, root / "passwords"
        self.log.parent.mkdir(exist_ok=True)

    @property
    def passwords_dir(self) -> Path:
        return self.passwords

    def _opened(self) -> Path:
        cluster, self.config = self.config, CONFIG
        try:
            opened = super()._opened()
        finally:
            self.config = cluster
        path = self.state / cluster.name
        path.write_text(cluster.read_text().replace(CONFIG.name, opened.name))
        return path


def cluster(root: Path) -> list[Node]:
    ports = [free_port() for _ in range(SIZE)]
    routes = [f"nats-route://route:secret@127.0.0.1:{port}" for port in ports]
    shared = {"FORGE_NATS_ROUTES": json.dumps(routes), "FORGE_NATS_ROUTE_PASSWORD": "'secret'"}
    return [
        Node(root, f"n{nth}", {"FORGE_NATS_CLUSTER_LISTEN": f"127.0.0.1:{port}", **shared})
        for nth, port in enumerate(ports, 1)
    ]


@contextlib.asynccontextmanager
async def clustered(root: Path) -> AsyncIterator[tuple[System, list[Node]]]:
    """A system over the three servers."""
    nodes = cluster(root)
    urls = ",".join(node.url for node in nodes)
    for node in nodes[1:]:
        node.launch()
    try:
        async with running(
            root, nats=nodes[0], render_ms="200", FORGE_NATS_URL=urls, FORGE_NATS_REPLICAS=str(SIZE)
        ) as system:
            yield system, nodes
    finally:
        for node in nodes[1:]:
            node.stop()


async def state(nodes: list[Node], stream: str = "FORGE_EVENTS") -> dict[str, Any]:
    """What a server that answers says of a stream's three."""
    for node in nodes:
        with contextlib.suppress(OSError, TimeoutError, nats.errors.Error):
            nc = await nats.connect(node.url, **ONCE)
            try:
                answer = await nc.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=2)
                found: dict[str, Any] = json.loads(answer.data).get("cluster") or {}
                if found.get("leader"):
                    return found
            finally:
                await nc.close()
    return {}


@pytest.mark.timeout(240)
async def test_the_leader_of_the_log_is_killed_and_nothing_is_lost(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    say(f"FORGE_TEST_SEED={SEED}")
    async with clustered(tmp_path) as (system, nodes), watching(system) as witness:
        crowd = Crowd(system, scaled(40), users=6, dice=dice, pause=0.3)
        async with asyncio.TaskGroup() as group:
            group.create_task(crowd.play())
            await happened(witness, "completed", times=dice.randrange(3, 10))
            leader = (await state(nodes))["leader"]
            (killed,) = [node for node in nodes if node.name == leader]
            if killed is system.nats:
                system.down.add("nats")
            killed.kill()
            await wait_until(lambda: led_by_another(nodes, leader), 30, "another server leads the log", 0.2)
            done = await finished(system)
            await wait_until(lambda: more_than(system, done + 3), 60, "two servers go on", 0.2)
        killed.launch()
        system.down.discard("nats")
        evidence = await settled(witness, crowd.asked, timeout=120)
        assert set(ends(evidence)) == {"completed"}
        await wait_until(lambda: whole(nodes), 30, "all three have everything again", 0.2)


async def led_by_another(nodes: list[Node], leader: Any) -> bool:
    return (await state(nodes)).get("leader") not in (None, leader)


async def whole(nodes: list[Node]) -> bool:
    others = (await state(nodes)).get("replicas", [])
    return len(others) == SIZE - 1 and all(other["current"] for other in others)


async def finished(system: System) -> int:
    async with system.client() as client:
        answer = await client.get("/stats")
        return int(answer.json()["total"]["completed"]) if answer.status_code == 200 else 0


async def more_than(system: System, jobs: int) -> bool:
    return await finished(system) > jobs
