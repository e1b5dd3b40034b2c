"""Load that never ends, through something that stands before the APIs and writes down what came of it."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import httpx

from acceptance.checker import Asked
from acceptance.players import ask_until_answered, request
from acceptance.system import API, PATIENCE, System
from waiting import wait_until


class Balancer(httpx.AsyncBaseTransport):
    """What stands before the APIs: it sends a request to one of those that say they are ready (to any
    where none does), over connections it keeps, and writes down what came of it."""

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
                apis = self._system.apis  # beside each other: one that is slow hides nothing of the others
                well = await asyncio.gather(*(self._is_ready(client, api) for api in apis))
                self.ready = [api for api, ready in zip(apis, well, strict=True) if ready] or apis
                await asyncio.sleep(0.05)  # the pace of a balancer's health check

    async def _is_ready(self, client: httpx.AsyncClient, api: str) -> bool:
        try:
            return (await client.get(self._system.url(api) + "/readyz")).status_code == 200
        except httpx.TransportError:
            return False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            answer = await self._sent(request)
        except httpx.TransportError as error:
            self.broken.append(f"{request.method} {request.url}: {error!r}")
            raise
        self.answers[answer.status_code] += 1
        if answer.status_code == 503:
            assert answer.headers.get("retry-after"), "it says when to come again"
        return answer

    async def _sent(self, request: httpx.Request) -> httpx.Response:
        """To the next, or to another one if that takes no connection, as balancers do."""
        first = self.choose()
        for api in (first, *(other for other in self._system.apis if other != first)):
            request.url = request.url.copy_with(port=self._system.ports[api])
            try:
                return await self._inner.handle_async_request(request)
            except httpx.ConnectError as error:
                refused = error
        raise refused

    async def aclose(self) -> None:
        await self._inner.aclose()


@asynccontextmanager
async def balanced(system: System) -> AsyncIterator[tuple[httpx.AsyncClient, Balancer]]:
    balancer = Balancer(system)
    looking = asyncio.create_task(balancer.look())
    try:
        async with httpx.AsyncClient(
            base_url=system.url("api") + API, transport=balancer, timeout=PATIENCE
        ) as client:
            yield client, balancer
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


class Load:
    """Players who ask for one picture after the other, until there are enough and they are told so; what they
    ask for is written down in `asked`."""

    def __init__(self, client: httpx.AsyncClient, asked: list[Asked], least: int) -> None:
        self.client, self.asked, self.least = client, asked, len(asked) + least
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

    async def goes_on(self, jobs: int, what: str) -> None:
        """Wait until so many jobs more were seen to be done."""
        before = self.seen_done
        await wait_until(lambda: self.seen_done >= before + jobs, 60, f"jobs go on after {what}")
