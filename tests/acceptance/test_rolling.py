"""Every process of forge is restarted, one after the other, while jobs run: nobody outside notices."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from acceptance.checker import Asked
from acceptance.players import ask_until_answered, request, scaled
from acceptance.settling import ends, settled, watching
from acceptance.system import API, WORKERS, System, running, say
from waiting import wait_until

USERS = 10
LEAVE_SECONDS = 1.5
GOING = 1012


class Balancer(httpx.AsyncBaseTransport):
    """What stands before the APIs: it sends a request to one of those that say they are ready, over
    connections it keeps, and writes down what came of it."""

    def __init__(self, system: System) -> None:
        self._system, self._inner = system, httpx.AsyncHTTPTransport()
        self._turn = itertools.count()
        self.ready = list(system.apis)
        self.answers: Counter[int] = Counter()
        self.broken: list[str] = []

    def choose(self) -> str:
        return self.ready[next(self._turn) % len(self.ready)]

    async def look(self) -> None:
        """Ask each API, again and again, whether it is ready."""
        async with httpx.AsyncClient(headers={"Connection": "close"}, timeout=5.0) as client:
            while True:
                self.ready = [api for api in self._system.apis if await self._is_ready(client, api)]
                await asyncio.sleep(0.05)

    async def _is_ready(self, client: httpx.AsyncClient, api: str) -> bool:
        try:
            return (await client.get(self._system.url(api) + "/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        api = self.choose()
        request.url = request.url.copy_with(port=self._system.ports[api])
        try:
            answer = await self._inner.handle_async_request(request)
        except httpx.TransportError as error:
            self.broken.append(f"{request.method} {request.url}: {error!r}")
            raise
        self.answers[answer.status_code] += 1
        if answer.status_code == 503:
            assert answer.headers.get("retry-after"), "it says when to come again"
        return answer

    async def aclose(self) -> None:
        await self._inner.aclose()


@asynccontextmanager
async def balanced(system: System) -> AsyncIterator[tuple[httpx.AsyncClient, Balancer]]:
    balancer = Balancer(system)
    looking = asyncio.create_task(balancer.look())
    try:
        async with httpx.AsyncClient(base_url=system.url("api") + API, transport=balancer) as client:
            yield client, balancer
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


class Load:
    """Players who ask for one picture after the other, until there are enough and they are told so."""

    def __init__(self, client: httpx.AsyncClient, least: int) -> None:
        self.client, self.least = client, least
        self.asked: list[Asked] = []
        self.seen_done = 0
        self.enough = asyncio.Event()

    async def player(self, user: str) -> None:
        while not self.enough.is_set() or len(self.asked) < self.least:
            one = request(user)
            self.asked.append(one)
            job = await ask_until_answered(self.client, one)
            await wait_until(partial(self._over, job, one.seq), 60, f"{job} is over", 0.1)
            self.seen_done += 1

    async def _over(self, job: str, seq: int) -> bool:
        answer = await self.client.get(f"/jobs/{job}", params={"min_seq": seq})
        return answer.status_code == 200 and answer.json()["status"] == "completed"


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
            async with connect(f"{url}?after={self.seen}") as socket:
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


@pytest.mark.timeout(400)
async def test_every_role_is_restarted_under_load_and_nobody_notices(root: Path) -> None:
    async with (
        running(root, render_ms="5-20", apis=2, FORGE_LEAVE_SECONDS=str(LEAVE_SECONDS)) as system,
        watching(system) as witness,
        balanced(system) as (client, balancer),
    ):
        load, listener = Load(client, scaled(150)), Listener(system, balancer)
        listening = asyncio.create_task(listener.listen())
        async with asyncio.TaskGroup() as players:
            for nth in range(USERS):
                players.create_task(load.player(f"user-{nth}"))
            for name in (*system.apis, *WORKERS):
                await _restarted(system, name, load)
            load.enough.set()
        say(f"{len(load.asked)} jobs, answers {balancer.answers}, sockets closed with {listener.codes}")

        evidence = await settled(witness, load.asked, timeout=120)
        assert set(ends(evidence)) == {"completed"}
        assert len(ends(evidence)) == len(load.asked)
        assert balancer.broken == []
        assert balancer.answers.keys() <= {200, 202, 503}
        everybody = dict.fromkeys((id_ for one in load.asked for id_ in one.answers), 1)
        await wait_until(lambda: listener.completed == everybody, 10, "the page has heard of each, once")
        assert set(listener.codes) == {GOING}
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        assert system.deaths == []


async def _restarted(system: System, name: str, load: Load) -> None:
    """As a deployment does it: SIGTERM, wait for its end, start it, wait until jobs come to their end."""
    process = system.process(name)
    system.terminate(name)
    await wait_until(lambda: not process.running, 40, f"{name} has ended")
    assert process.exit_status == 0, f"{name}: {process.last_words()}"
    system.members[name].stop()
    system.start(name)
    await system.ready()
    before = load.seen_done
    await wait_until(lambda: load.seen_done > before + USERS, 60, f"jobs go on after {name} was restarted")
