"""A log on three servers: any of them answers who reads, also one that is behind the one that leads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import nats
import pytest

from acceptance.cluster import SIZE, Node, cluster
from forge import topology
from forge.eventstore import EventStore

WRITERS, LOOKS = 6, 600


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    three = cluster(tmp_path_factory.mktemp("three"))
    for node in three:
        node.launch()
    yield three
    for node in three:
        node.kill()  # one that is told to stop would wait for the others


@pytest.fixture
async def logs(nodes: list[Node]) -> AsyncIterator[list[EventStore]]:
    """The log as it is read and written at each of the servers."""
    async with AsyncExitStack() as stack:
        clients = []
        for node in nodes:
            await asyncio.to_thread(node.wait_ready)
            clients.append(await nats.connect(node.url))
            stack.push_async_callback(clients[-1].close)
        await topology.await_leader(clients[0])
        await topology.apply(clients[0], replicas=SIZE)
        yield [EventStore(client) for client in clients]


async def test_the_newest_event_is_found_at_whichever_server(logs: list[EventStore]) -> None:
    """While others write, so that who follows is always a little behind who leads."""
    enough = asyncio.Event()

    async def write(store: EventStore, user: str) -> None:
        while not enough.is_set():
            await store.nc.request(topology.admissions(user), b"x" * 800, headers={"ce-id": user}, timeout=30)

    async with asyncio.TaskGroup() as writers:
        for nth in range(WRITERS):
            writers.create_task(write(logs[nth % SIZE], f"user-{nth}"))
        for nth in range(LOOKS):
            store = logs[nth % SIZE]
            newest = await store.head()
            assert not newest or await store.id_at(newest), f"event {newest}, look {nth}"
        enough.set()
