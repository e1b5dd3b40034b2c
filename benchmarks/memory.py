"""Memory of each process: idle, with 100 jobs waiting, with 100 sockets: ``python -m benchmarks.memory``.

A round starts everything anew. *Idle* is after a few jobs; then a hundred jobs wait behind three that ComfyUI
does not finish; then a hundred WebSockets listen, too. Told is the proportional set size (PSS, psutil) of a
process and its children: pages that several share are counted once in all, which makes Postgres's figure a
real one. RSS stands beside it.

We want it flat: neither a hundred jobs nor a hundred sockets may add a tenth.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

import aiohttp
import msgspec
import psutil
from rich.table import Table

from benchmarks import harness, servers
from benchmarks.asked import EVENTS, SUBMIT, swatch
from benchmarks.harness import PATIENCE_SECONDS, Figure

API = "/api/v1/comfyui"
JOBS, SOCKETS, USERS_JOBS = 100, 100, 10
PLACES = 3
FLAT = 1.1
NAMES = ("api", "worker", "nats", "postgres")
STATES = ("idle", "100 jobs waiting", "100 sockets")


class Held(msgspec.Struct, frozen=True):
    """Bytes of a process and its children."""

    pss: int
    rss: int


Round = dict[str, dict[str, Held]]
"""State → process → what it held."""


def main() -> None:
    given = harness.command(__doc__.splitlines()[0] if __doc__ else "", rounds=3, seconds=3.0)
    rounds: list[Round] = []
    for _ in range(given.rounds):
        with (
            servers.place(given.dir) as place,
            servers.simulator(place) as comfyui,
            servers.forge_worker(place, comfyui),
            servers.forge_api(place) as forge,
        ):
            where = harness.environment(place.root)
            rounds.append(asyncio.run(_round(place, forge, comfyui, given.seconds)))
    how = f"{given.rounds} rounds, everything started anew; PSS of a process and its children, MiB"
    harness.show("memory", where, how, [_table(rounds)])
    harness.write(given.json, "memory", where, rounds=rounds, figures=_figures(rounds))


async def _round(place: servers.Place, forge: str, comfyui: str, seconds: float) -> Round:
    found: Round = {}
    async with aiohttp.ClientSession(base_url=forge) as session:
        await _submit(session, "warm", 0, 3)
        await _until(lambda: _counts(session), lambda counts: counts.get("completed") == 3)
        await _held_back(session, comfyui)
        found["idle"] = await _sampled(place, seconds)
        for nth in range(JOBS + PLACES):
            await _submit(session, f"user-{nth // USERS_JOBS}", 100 + nth, 1)
        await _until(lambda: _counts(session), lambda counts: counts.get("pending") == JOBS)
        found["100 jobs waiting"] = await _sampled(place, seconds)
        async with AsyncExitStack() as stack:
            for nth in range(SOCKETS):
                await _socket(stack, session, f"viewer-{nth}")
            found["100 sockets"] = await _sampled(place, seconds)
        await _let_go(session, comfyui)
    return found


async def _held_back(session: aiohttp.ClientSession, comfyui: str) -> None:
    """From now on ComfyUI takes prompts and finishes none in time; the job type allows half a minute."""
    async with session.post(f"{comfyui}/simulator/render", json={"least_ms": 600_000}) as answer:
        answer.raise_for_status()


async def _let_go(session: aiohttp.ClientSession, comfyui: str) -> None:
    """Nothing hangs any more: a worker would wait for it before it stops."""
    async with session.post(f"{comfyui}/simulator/render", json={"least_ms": 0}) as answer:
        answer.raise_for_status()
    async with session.get(f"{API}/queue", params={"status": "running"}) as answer:
        running = (await answer.json())["items"]
    for job in running:
        async with session.delete(f"{API}/jobs/{job['id']}"):
            pass


async def _submit(session: aiohttp.ClientSession, user: str, first: int, count: int) -> None:
    for color in range(first, first + count):
        body = swatch(color)
        headers = {"X-Forge-User": user, "Content-Type": "application/json", "Idempotency-Key": f"{color}"}
        await _answered(lambda body=body, headers=headers: session.post(SUBMIT, data=body, headers=headers))


async def _counts(session: aiohttp.ClientSession) -> dict[str, int]:
    told = await _answered(lambda: session.get(f"{API}/queue", params={"limit": 1}))
    counts: dict[str, int] = told["counts"]
    return counts


async def _answered(ask: Callable[[], AbstractAsyncContextManager[aiohttp.ClientResponse]]) -> dict[str, Any]:
    """What forge says; asked again while it is too busy to know in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        async with ask() as answer:
            if answer.ok:
                said: dict[str, Any] = await answer.json()
                return said
            if answer.status != 503 or time.monotonic() > deadline:
                raise SystemExit(f"forge answered {answer.status}: {await answer.text()}")
        await asyncio.sleep(0.2)


async def _socket(stack: AsyncExitStack, session: aiohttp.ClientSession, user: str) -> None:
    """One that has heard where the log ends, and goes on listening."""
    socket = await stack.enter_async_context(session.ws_connect(EVENTS, headers={"X-Forge-User": user}))
    while json.loads((await socket.receive(PATIENCE_SECONDS)).data)["t"] != "mark":
        pass


async def _until(
    look: Callable[[], Awaitable[dict[str, int]]], good: Callable[[dict[str, int]], bool]
) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not good(seen := await look()):
        if time.monotonic() > deadline:
            raise SystemExit(f"the jobs did not come to stand as wanted: {seen}")
        await asyncio.sleep(0.1)


async def _sampled(place: servers.Place, seconds: float) -> dict[str, Held]:
    """The median of ten looks in so many seconds."""
    looks: list[dict[str, Held]] = []
    for _ in range(10):
        await asyncio.sleep(seconds / 10)
        looks.append({name: await asyncio.to_thread(_held, place.pids[name]) for name in NAMES})

    def middle(name: str, what: str) -> int:
        return int(statistics.median(getattr(look[name], what) for look in looks))

    return {name: Held(middle(name, "pss"), middle(name, "rss")) for name in NAMES}


def _held(pid: int) -> Held:
    process = psutil.Process(pid)
    pss = rss = 0
    for one in (process, *process.children(recursive=True)):
        try:
            memory: Any = one.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        rss += memory.rss
        pss += getattr(memory, "pss", memory.uss)
    return Held(pss, rss)


# ------------------------------------------------------------------- the report


def _mib(rounds: list[Round], state: str, name: str, what: str = "pss") -> list[float]:
    return [getattr(found[state][name], what) / 2**20 for found in rounds]


def _table(rounds: list[Round]) -> Table:
    table = Table(title="memory, MiB of PSS (RSS)")
    table.add_column("process")
    for state in STATES:
        table.add_column(state, justify="right")
    for name in NAMES:
        cells = []
        for state in STATES:
            rss = harness.spread(_mib(rounds, state, name, "rss")).median
            cells.append(f"{harness.spread(_mib(rounds, state, name)).shown()} ({rss:.1f})")
        table.add_row(name, *cells)
    return table


def _figures(rounds: list[Round]) -> list[Figure]:
    figures = []
    for name in NAMES:
        idle, jobs, sockets = (_mib(rounds, state, name) for state in STATES)
        figures += [
            harness.figure(
                f"memory of {name}, idle", harness.spread(idle), "MiB", runs=len(rounds), digits=1
            ),
            _grown(f"the same, {JOBS} jobs waiting", jobs, idle),
            _grown(f"the same, {SOCKETS} sockets too", sockets, jobs),
        ]
    return figures


def _grown(what: str, after: list[float], before: list[float]) -> Figure:
    added = harness.difference(after, before)
    beside = f"{harness.spread(after).median:.1f} MiB, {added.median * 1024 / 100:.1f} kiB each"
    runs = len(after)
    return harness.figure(what, harness.ratio(after, before), "×", runs=runs, beside=beside, at_most=FLAT)


if __name__ == "__main__":
    main()
