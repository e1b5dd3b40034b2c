"""Every process of forge is restarted, one after the other, while jobs run: nobody outside notices."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from acceptance.balancing import Balancer, Load, balanced
from acceptance.checker import Asked
from acceptance.evidence import Witness
from acceptance.players import scaled
from acceptance.settling import ends, settled
from acceptance.system import API, WORKERS, System, running, say
from waiting import wait_until

USERS = 10
LEAVE_SECONDS = 4
"""For a balancer to notice, on a busy machine, too."""
SERVERS = {"nats": signal.SIGTERM, "postgres": signal.SIGINT}
"""How each is told to end: Postgres by a fast shutdown, which does not wait until everybody has left."""

GOING = 1012


class Listener:
    """A page that hears of every job: it comes again, elsewhere, when it is told that its API is going."""

    def __init__(self, system: System, balancer: Balancer) -> None:
        self._system, self._balancer = system, balancer
        self.seen = 0
        self.completed: Counter[str] = Counter()
        self.codes: list[int | None] = []

    async def listen(self) -> None:
        while True:
            url = self._system.url(self._balancer.choose()).replace("http", "ws", 1) + API + "/events"
            try:
                socket = await connect(f"{url}?after={self.seen}")
            except (OSError, InvalidHandshake) as error:
                if isinstance(error, InvalidStatus) and error.response.status_code != 503:
                    raise
                await asyncio.sleep(0.01)  # a page's pause; the next one takes it
                continue
            async with socket:
                try:
                    while True:
                        self._hear(json.loads(await socket.recv()))
                except ConnectionClosed:
                    self.codes.append(socket.close_code)

    def _hear(self, message: dict[str, object]) -> None:
        if message["t"] in ("ev", "mark"):
            self.seen = max(self.seen, int(str(message["seq"])))
        if message["t"] == "ev" and message["type"] == "job.completed":
            self.completed[str(message["key"])] += 1


@pytest.fixture(scope="module")
async def system(module_root: Path) -> AsyncIterator[System]:
    leave = str(LEAVE_SECONDS)
    async with running(module_root, render_ms="5-20", apis=2, FORGE_LEAVE_SECONDS=leave) as system:
        yield system


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    """Whatever was asked for in any of these tests."""
    return []


@asynccontextmanager
async def played(system: System, asked: list[Asked], jobs: int) -> AsyncIterator[tuple[Load, Balancer]]:
    """At least so many jobs, asked for until the block ends, and a page that listens; all come to their end,
    the page has heard of each once, and no answer is anything else than a good one or a 503 that says when to
    come again."""
    async with balanced(system) as (client, balancer):
        load, listener = Load(client, asked, jobs), Listener(system, balancer)
        listening = asyncio.create_task(listener.listen())
        async with asyncio.TaskGroup() as players:
            for nth in range(USERS):
                players.create_task(load.player(f"user-{nth}"))
            yield load, balancer
            load.enough.set()
        say(f"{len(asked)} jobs, answers {balancer.answers}, sockets closed with {listener.codes}")
        assert balancer.broken == []
        assert balancer.answers.keys() <= {200, 202, 503}
        everybody = dict.fromkeys((id_ for one in asked for id_ in one.answers), 1)
        await wait_until(lambda: listener.completed == everybody, 60, "the page has heard of each, once")
        assert set(listener.codes) <= {GOING}
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
    assert system.deaths == []


@pytest.mark.timeout(400)
async def test_every_role_is_restarted_under_load_and_nobody_notices(
    system: System, witness: Witness, asked: list[Asked]
) -> None:
    async with played(system, asked, scaled(150)) as (load, _):
        for name in (*system.apis, *WORKERS):
            await _restarted(system, name)
            await load.goes_on(USERS, name)
    evidence = await settled(witness, asked, timeout=120)
    assert ends(evidence) == ["completed"] * len(asked)


@pytest.mark.fault("C3")
async def test_the_servers_are_restarted_under_load_and_clients_are_told_when_to_come_again(
    system: System, witness: Witness, asked: list[Asked]
) -> None:
    async with played(system, asked, USERS) as (load, balancer):
        for name in SERVERS:
            before = balancer.answers.copy()
            await _restarted(system, name)
            await load.goes_on(USERS, name)
            say(f"{name}: {balancer.answers - before}")
    evidence = await settled(witness, asked, timeout=120)
    assert ends(evidence) == ["completed"] * len(asked)


async def _restarted(system: System, name: str) -> None:
    """As a deployment does it: the word to stop, wait for its end, start it, wait until everything serves."""
    process = system.process(name)
    system.down.add(name)
    process.send(SERVERS.get(name, signal.SIGTERM))
    await wait_until(lambda: not process.running, 40, f"{name} has ended")
    assert process.exit_status == 0, f"{name}: {process.last_words()}"
    system.members[name].stop()
    system.start(name)
    await system.ready()
