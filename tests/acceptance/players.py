"""Clients: they ask as a game does, with an Idempotency-Key, and write down what they were told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import httpx

from acceptance.checker import Asked
from acceptance.system import PATIENCE, System

T = TypeVar("T")

SCALE = float(os.environ.get("FORGE_TEST_SCALE", "1"))
"""How many times as many jobs and faults as usual."""

SEED = int(os.environ.get("FORGE_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
"""What the moments and choices of faults follow from; a failed test tells it."""

_numbers = iter(range(10**9))


def scaled(count: int) -> int:
    return max(1, round(count * SCALE))


def request(user: str, *, job_type: str = "ui_icon", **more: Any) -> Asked:
    """A small picture for a user; `more` is what else the body says."""
    mark = f"mark-{next(_numbers)}"
    params = more.pop("params", {"width": 256, "height": 256})
    return Asked(
        mark, user, {"job_type": job_type, "params": params, "session_id": mark, **more}, str(uuid.uuid4())
    )


async def ask(client: httpx.AsyncClient, asked: Asked) -> str | None:
    """Ask once; the job, or None when the answer does not say, or says that it is too much for now."""
    headers = {"Idempotency-Key": asked.key, "X-Forge-User": asked.user}
    try:
        answer = await client.post("/jobs", json=asked.body, headers=headers)
    except httpx.TimeoutException as late:
        raise AssertionError(f"{asked.mark} was not answered at all in {PATIENCE} s") from late
    except httpx.TransportError:
        return None
    if answer.status_code in (429, 503):
        assert answer.headers.get("retry-after"), "it says when to come again"
        return None
    assert answer.status_code == 202, answer.text
    id_: str = answer.json()["id"]
    asked.answers.append(id_)
    asked.seq = answer.json()["seq"]
    return id_


async def granted(client: httpx.AsyncClient, method: str, path: str, **more: Any) -> httpx.Response:
    """Say it until the answer is another one than to come again, as a client is to do."""
    deadline = time.monotonic() + PATIENCE
    while True:
        answer = await client.request(method, path, **more)
        if answer.status_code != 503 or time.monotonic() > deadline:
            return answer
        await asyncio.sleep(0.1)  # a client's pause before it asks again


async def in_time(seconds: float, act: Callable[[], Awaitable[T]]) -> T:
    """What it gives, in less than so many seconds, or it hangs."""
    began = time.monotonic()
    answer = await act()
    took = time.monotonic() - began
    assert took < seconds, f"it hangs: {took:.1f} s, and not within {seconds}"
    return answer


async def ask_until_answered(client: httpx.AsyncClient, asked: Asked, patience: float = 60.0) -> str:
    """Repeat the request, under its key, until it is accepted."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if (id_ := await ask(client, asked)) is not None:
            return id_
        await asyncio.sleep(0.1)  # a client's pause before it asks again
    raise AssertionError(f"{asked.mark} was not accepted within {patience} s")


class Crowd:
    """Players who ask at random moments and look what became of it; some give up when they hear nothing, some
    say everything twice."""

    def __init__(
        self,
        system: System,
        jobs: int,
        users: int,
        dice: random.Random,
        pause: float,
        fickle: float = 0.0,
    ) -> None:
        self.system, self.dice, self.pause, self.fickle = system, dice, pause, fickle
        self.asked = [request(f"user-{nth % users}", priority=dice.randint(1, 10)) for nth in range(jobs)]
        self.seen: Counter[int] = Counter()
        """What looking was answered with, by status code."""

    async def play(self) -> None:
        """Ask for everything, each player one thing after the other."""
        by_user: dict[str, list[Asked]] = {}
        for asked in self.asked:
            by_user.setdefault(asked.user, []).append(asked)
        async with asyncio.TaskGroup() as group:
            for requests in by_user.values():
                group.create_task(self._player(requests, random.Random(self.dice.random())))
        assert self.seen.keys() <= {200, 503}, self.seen

    async def _player(self, requests: Sequence[Asked], dice: random.Random) -> None:
        async with self.system.client(requests[0].user, dice.choice(self.system.apis)) as client:
            for asked in requests:
                await asyncio.sleep(dice.uniform(0, 2 * self.pause))  # players think
                if dice.random() < 0.25:
                    await ask(client, asked)
                    continue
                id_ = await ask_until_answered(client, asked)
                await self._look(client, dice.choice(("/queue", "/assets", "/stats", f"/jobs/{id_}/history")))
                if dice.random() < 0.25:
                    again = await ask(client, asked)
                    assert again in (None, id_)
                if dice.random() < self.fickle:
                    await asyncio.sleep(dice.uniform(0, 1))  # and change their mind
                    await self._act(client, "DELETE", f"/jobs/{id_}")
                    await self._act(client, "POST", f"/jobs/{id_}/retry")

    async def _act(self, client: httpx.AsyncClient, method: str, path: str) -> None:
        with contextlib.suppress(httpx.NetworkError, httpx.RemoteProtocolError):
            answer = await client.request(method, path)
            assert answer.status_code in (202, 409, 429, 503), f"{method} {path}: {answer.text}"

    async def _look(self, client: httpx.AsyncClient, path: str) -> None:
        with contextlib.suppress(httpx.NetworkError, httpx.RemoteProtocolError):
            answer = await client.get(path)
            self.seen[answer.status_code] += 1
