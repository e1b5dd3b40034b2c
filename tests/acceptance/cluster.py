"""Three servers that hold the log together, each of which may be ended and started again."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import nats
import nats.errors

from acceptance.system import System, running
from forge.embedded import EmbeddedNats
from forge.embedded.nats import CONFIG
from ports import free_port


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


BRISK = '\nlame_duck_grace_period: "500ms"\n'
"""A server that leaves hands over at once and then waits ten seconds for clients to go by themselves."""


class Node(EmbeddedNats):
    """One of the servers, by `nats/cluster.conf`; all of them know the same users."""

    def __init__(self, root: Path, name: str, variables: Mapping[str, str]) -> None:
        super().__init__(
            root / name,
            free_port(),
            monitoring_port=free_port(),
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
        path.write_text(cluster.read_text().replace(CONFIG.name, opened.name) + BRISK)
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
async def clustered(root: Path, *, render_ms: str = "200") -> AsyncIterator[tuple[System, list[Node]]]:
    """A system over the three servers."""
    nodes = cluster(root)
    urls = ",".join(node.url for node in nodes)
    for node in nodes[1:]:
        node.launch()
    try:
        async with running(
            root, nats=nodes[0], render_ms=render_ms, FORGE_NATS_URL=urls, FORGE_NATS_REPLICAS=str(SIZE)
        ) as system:
            yield system, nodes
    finally:
        for node in nodes[1:]:
            if node.process is not None:
                node.process.send(signal.SIGTERM)  # one after the other they would wait for each other
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


async def led_by_another(nodes: list[Node], leader: Any) -> bool:
    return (await state(nodes)).get("leader") not in (None, leader)


async def whole(nodes: list[Node]) -> bool:
    others = (await state(nodes)).get("replicas", [])
    return len(others) == SIZE - 1 and all(other["current"] for other in others)
