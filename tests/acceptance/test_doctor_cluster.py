"""`forge doctor` before three servers of the log, one of which or more is ill."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from nats.aio.client import Client

from acceptance.cluster import SIZE, Node, cluster
from forge import topology
from forge.broker import connect, request
from forge.doctor import Finding, Level, examine
from forge.embedded import EmbeddedNats
from forge.errors import ForgeError
from processes import freeze, thaw
from waiting import wait_until

NOWHERE = {"FORGE_POSTGRES_DSN": "postgresql://postgres@127.0.0.1:9/postgres"}
OF_THE_LOG = ("nats", "streams", "log")


class Ward:
    """Three servers with the streams of forge, and what the doctor says of the log alone."""

    def __init__(self, nodes: list[Node], root: Path) -> None:
        self.nodes = nodes
        self.environ = {
            "FORGE_NATS_URL": ",".join(node.url for node in nodes),
            "FORGE_NATS_PASSWORDS_DIR": str(nodes[0].passwords_dir),
            "FORGE_DATA_DIR": str(root),
            **NOWHERE,
        }

    async def copies(self, stream: str, count: int) -> str:
        """Have so many copies made of a stream; the server that leads it then."""
        async with self.connected() as nc:
            config = json.loads(await request(nc, f"STREAM.INFO.{stream}"))["config"]

            async def updated() -> bool:
                with contextlib.suppress(ForgeError):  # a server that just came back may not be seen yet
                    await request(nc, f"STREAM.UPDATE.{stream}", config | {"num_replicas": count})
                    return True
                return False

            await wait_until(updated, 30, f"{stream} takes it", 0.2)

            async def leader() -> str:
                with contextlib.suppress(ForgeError):
                    told = json.loads(await request(nc, f"STREAM.INFO.{stream}", timeout=1))["cluster"]
                    if len(told.get("replicas") or ()) == count - 1:
                        return str(told.get("leader", ""))
                return ""

            return await wait_until(leader, 60, f"{stream} has {count} copies", 0.1)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Client]:
        nc = await connect(self.environ["FORGE_NATS_URL"], "test")
        try:
            yield nc
        finally:
            await nc.close()

    async def findings(self, **changed: str) -> dict[str, list[Finding]]:
        found: dict[str, list[Finding]] = {}
        for finding in await examine(self.environ | changed):
            if finding.check in OF_THE_LOG:
                found.setdefault(finding.check, []).append(finding)
        return found

    async def wrong(self, **changed: str) -> dict[str, Finding]:
        every = await self.findings(**changed)
        found = [finding for findings in every.values() for finding in findings]
        return {f.check: f for f in found if f.level in (Level.WARNING, Level.FAILURE)}

    async def names(self, *, url: str = "", **said: str) -> dict[str, Finding]:
        """Wait until exactly these checks find something, and say this of it; `url` is another address."""
        changed = {"FORGE_NATS_URL": url} if url else {}

        async def found() -> bool:
            self.last = await self.wrong(**changed)
            return self.last.keys() == said.keys() and all(
                text in self.last[check].found for check, text in said.items()
            )

        self.last: dict[str, Finding] = {}
        try:
            await wait_until(found, 60, "", 0.2)
        except AssertionError:
            raise AssertionError(f"{said} was to be said: {self.last}") from None
        return self.last


@pytest.fixture(scope="module")
async def ward(module_root: Path) -> AsyncIterator[Ward]:
    nodes = cluster(module_root)
    for node in nodes:
        node.launch()
    try:
        for node in nodes:
            node.wait_ready()
        ward = Ward(nodes, module_root)
        async with ward.connected() as nc:
            await topology.await_leader(nc)
            await topology.apply(nc, replicas=SIZE)
        await ward.names()
        yield ward
    finally:
        for node in nodes:
            if node.process is not None:
                node.process.send(signal.SIGKILL)
        for node in nodes:
            node.stop()


async def test_of_a_healthy_cluster_it_tells_who_leads(ward: Ward) -> None:
    (found,) = (await ward.findings())["nats"]
    assert all(node.url in found.found for node in ward.nodes)
    assert found.found.endswith(" leads the log")


async def test_with_one_of_three_away_the_log_goes_on_and_with_two_it_does_not(ward: Ward) -> None:
    killed, frozen, _ = ward.nodes
    assert frozen.process is not None
    killed.kill()
    found = await ward.names(nats=f"{killed.url}: ")
    assert found["nats"].level == Level.WARNING
    assert "nats/cluster.conf" in found["nats"].remedy
    await freeze(frozen.process.pid)
    found = await ward.names(nats="1 of 3 servers answer, too few to agree")
    assert f"{frozen.url}: no answer" in found["nats"].found
    thaw(frozen.process.pid)
    killed.launch()
    await ward.names()


async def test_a_stream_of_one_copy_is_told_before_and_after_its_server_is_lost(ward: Ward) -> None:
    alone = await ward.copies(topology.METRICS, 1)
    found = await ward.names(streams="FORGE_METRICS: one copy")
    assert "FORGE_NATS_REPLICAS=3 forge setup" in found["streams"].remedy
    (holder,) = [node for node in ward.nodes if node.name == alone]
    holder.kill()
    await ward.names(nats=f"{holder.url}: ", streams="FORGE_METRICS: no server leads")
    holder.launch()
    await ward.names(streams="FORGE_METRICS: one copy")
    await ward.copies(topology.METRICS, SIZE)
    await ward.names()


async def test_servers_that_are_not_one_cluster_are_no_log(ward: Ward, root: Path) -> None:
    alone = EmbeddedNats(root / "alone", anybody=True)
    alone.start()
    try:
        found = await ward.names(nats="not one cluster", url=f"{ward.nodes[0].url},{alone.url}")
        assert found["nats"].level == Level.FAILURE
    finally:
        alone.stop()
