"""The same work through forge, ComfyUI's own queue, and peers: ``python -m benchmarks.peers``.

``--peer LABEL COMMAND`` starts a peer that speaks the Comfy API v2, wherever it is installed; ``{comfyui}``,
``{port}`` and ``{state}`` in the command are filled in. All stand in front of one simulator, one after the
other, and are asked in the same way: a job is posted, then polled until it is over, every 10 ms with one in
flight and every 5 ms for each in flight with more; then its picture is fetched. Pictures are flat, 64 by 64,
each of a colour of its own.

*Burst*: ten clients post and do not wait. *Killed*: thirty jobs of 200 ms, the whole service is killed with
SIGKILL when ten are over, started again, and asked for every job it took. *ComfyUI restarted*: the same, but
it is ComfyUI that forgets its queue and its history. *Crowd*: 32 jobs of one user, then one of another: how
many of them ended first.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import secrets
import shlex
import statistics
import sys
import time
from abc import abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import aiohttp
import msgspec
from rich.table import Table

from benchmarks import harness, servers
from forge.embedded import OwnedProcess

LEVELS = {1: 40, 10: 200, 100: 400}
"""In flight → jobs."""

BURST, BURST_CLIENTS = 200, 10
THIRTY, WHEN_OVER, DRAW_MS = 30, 10, 200
CROWD = 32
PATIENCE_SECONDS = 30.0
GONE, OVER_WELL = "gone", "completed"


class Refused(Exception):
    """A job was not taken; says why."""


class Service(Protocol):
    """Something that draws when it is asked to over HTTP."""

    label: str

    @abstractmethod
    def launch(self) -> None:
        """Start it, or start it again; its state is where it was."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL for all of it."""

    @abstractmethod
    async def submit(self, session: aiohttp.ClientSession, user: str, color: int) -> str:
        """The id of the job."""

    @abstractmethod
    async def status(self, session: aiohttp.ClientSession, job: str) -> str:
        """``completed``, ``failed``, ``gone`` where it is not known; anything else is under way."""

    @abstractmethod
    async def picture(self, session: aiohttp.ClientSession, job: str) -> bytes | None:
        """The bytes, if they can be had."""


class Processes:
    """Commands that belong together."""

    def __init__(self, place: servers.Place, label: str, *commands: list[str], **variables: str) -> None:
        self.label, self._place, self._commands = label, place, commands
        self._environ = {**place.environ, **variables}
        self._running: list[OwnedProcess] = []

    def launch(self) -> None:
        self._running = [
            OwnedProcess(
                words, log=self._place.root / f"{self.label}.log", cwd=self._place.root, env=self._environ
            )
            for words in self._commands
        ]

    def kill(self) -> None:
        for process in self._running:
            process.kill()


class Forge(Processes):
    """forge's API and worker."""

    def __init__(self, place: servers.Place, comfyui: str) -> None:
        port = servers.free_port()
        self._jobs = f"http://127.0.0.1:{port}/api/v1/comfyui"
        forge = [sys.executable, "-P", "-m", "forge"]
        super().__init__(
            place,
            "forge",
            [*forge, "api", "--open-to-loopback"],
            [*forge, "worker"],
            FORGE_PORT=str(port),
            FORGE_COMFYUI_URLS=comfyui,
        )

    async def submit(self, session: aiohttp.ClientSession, user: str, color: int) -> str:
        body = {"job_type": servers.JOB_TYPE, "params": {"color": color}}
        headers = {"X-Forge-User": user, "Idempotency-Key": uuid4().hex}
        async with session.post(f"{self._jobs}/jobs", json=body, headers=headers) as answer:
            return _id(await answer.json(), answer.status, 202)

    async def status(self, session: aiohttp.ClientSession, job: str) -> str:
        async with session.get(f"{self._jobs}/jobs/{job}") as answer:
            if answer.status == 404:
                return GONE
            return str((await answer.json()).get("status", ""))

    async def picture(self, session: aiohttp.ClientSession, job: str) -> bytes | None:
        async with session.get(f"{self._jobs}/jobs/{job}") as answer:
            [asset] = (await answer.json())["assets"]
        async with session.get(f"{self._jobs}/assets/{asset['id']}/file") as answer:
            return await answer.read() if answer.status == 200 else None


class ComfyV2(Processes):
    """A peer that speaks the Comfy API v2."""

    def __init__(self, place: servers.Place, comfyui: str, label: str, command: str) -> None:
        port, state = servers.free_port(), place.root / f"state-{label}"
        state.mkdir()
        words = shlex.split(command.format(comfyui=comfyui, port=port, state=state))
        self._url = f"http://127.0.0.1:{port}/api/v2"
        super().__init__(place, label, words)

    async def submit(self, session: aiohttp.ClientSession, user: str, color: int) -> str:
        headers = {"Idempotency-Key": uuid4().hex}
        async with session.post(
            f"{self._url}/jobs", json={"workflow": graph(color)}, headers=headers
        ) as answer:
            return _id(await answer.json(), answer.status, 201)

    async def status(self, session: aiohttp.ClientSession, job: str) -> str:
        async with session.get(f"{self._url}/jobs/{job}") as answer:
            said = str((await answer.json()).get("status", "")) if answer.status == 200 else GONE
        return {"succeeded": OVER_WELL, "unknown": GONE, "canceled": "failed"}.get(said, said)

    async def picture(self, session: aiohttp.ClientSession, job: str) -> bytes | None:
        async with session.get(f"{self._url}/jobs/{job}") as answer:
            outputs = (await answer.json()).get("outputs", [])
        if not outputs:
            return None
        async with session.get(outputs[0]["url"]) as answer:
            return await answer.read() if answer.status == 200 else None


class Bare:
    """ComfyUI's own queue, without anything in front."""

    label = "ComfyUI alone"

    def __init__(self, comfyui: str) -> None:
        self._url = comfyui

    def launch(self) -> None:
        """It runs."""

    def kill(self) -> None:
        """There is nothing to kill."""

    async def submit(self, session: aiohttp.ClientSession, user: str, color: int) -> str:
        body = {"prompt": graph(color), "prompt_id": str(uuid4()), "client_id": user}
        async with session.post(f"{self._url}/prompt", json=body) as answer:
            return _id(await answer.json(), answer.status, 200, "prompt_id")

    async def status(self, session: aiohttp.ClientSession, job: str) -> str:
        async with session.get(f"{self._url}/history/{job}") as answer:
            if job in await answer.json():
                return OVER_WELL
        async with session.get(f"{self._url}/queue") as answer:
            queue = await answer.json()
        known = {entry[1] for entry in queue["queue_running"] + queue["queue_pending"]}
        return "queued" if job in known else GONE

    async def picture(self, session: aiohttp.ClientSession, job: str) -> bytes | None:
        async with session.get(f"{self._url}/history/{job}") as answer:
            [image] = (await answer.json())[job]["outputs"]["2"]["images"]
        async with session.get(f"{self._url}/view", params=image) as answer:
            return await answer.read() if answer.status == 200 else None


def graph(color: int) -> dict[str, Any]:
    """A flat picture; the name it is saved under is its own."""
    empty = {"width": 64, "height": 64, "batch_size": 1, "color": color}
    save = {"images": ["1", 0], "filename_prefix": f"peer/{color}"}
    return {
        "1": {"class_type": "EmptyImage", "inputs": empty},
        "2": {"class_type": "SaveImage", "inputs": save},
    }


def _id(body: Any, status: int, wanted: int, key: str = "id") -> str:
    if status != wanted:
        raise Refused(f"{status}: {body}"[:200])
    return str(body[key])


# -------------------------------------------------------------------- the work


class Row(msgspec.Struct):
    """What one service showed. Of each thirty: still known, completed, picture readable."""

    label: str
    burst_per_second: float = 0.0
    jobs_per_second: dict[int, float] = {}
    p50_ms: dict[int, float] = {}
    killed: tuple[int, int, int] = (0, 0, 0)
    comfyui_restarted: tuple[int, int, int] = (0, 0, 0)
    crowd_taken: int = 0
    crowd_before: int = 0
    crowd_seconds: float = 0.0


class Bench:
    """One service, and the simulator behind it."""

    def __init__(self, service: Service, comfyui: str, session: aiohttp.ClientSession, scale: float) -> None:
        self.service, self.comfyui, self.session, self.scale = service, comfyui, session, scale
        first = secrets.randbelow(1 << 23)
        self.colors = (first + nth for nth in itertools.count())

    async def run(self) -> Row:
        row = Row(self.service.label)
        await self._draw_ms(0)
        await self._serves()
        self._say("burst")
        row.burst_per_second = await self._burst()
        for level, jobs in LEVELS.items():
            self._say(f"{level} in flight")
            rate, p50 = await self._through(level, max(level, int(jobs * self.scale)))
            row.jobs_per_second[level], row.p50_ms[level] = rate, p50
        await self._draw_ms(DRAW_MS)
        self._say("crowd")
        row.crowd_taken, row.crowd_before, row.crowd_seconds = await self._crowd()
        self._say("killed")
        row.killed = await self._thirty(self._killed)
        self._say("ComfyUI restarted")
        row.comfyui_restarted = await self._thirty(self._comfyui_restarted)
        return row

    def _say(self, what: str) -> None:
        sys.stderr.write(f"{self.service.label}: {what}\n")

    async def _draw_ms(self, milliseconds: int) -> None:
        await self._simulator("render", {"least_ms": milliseconds})

    async def _simulator(self, what: str, body: dict[str, int]) -> None:
        async with self.session.post(f"{self.comfyui}/simulator/{what}", json=body) as answer:
            answer.raise_for_status()

    async def _serves(self) -> None:
        """Wait until a job goes through."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                job = await self._submit("warm", 0)
                break
            except (Refused, aiohttp.ClientError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)
        await self._over(job, 0.01)

    async def _submit(self, user: str, nth: int) -> str:
        """Nobody may have many waiting at forge: after ten jobs another user asks."""
        return await self.service.submit(self.session, f"{user}-{nth // 10}", next(self.colors))

    async def _over(self, job: str, pause: float) -> str:
        """How it ended. It is gone when it is said to be three times: between a look at the history and one
        at the queue a job can go from one to the other."""
        deadline, gone = time.monotonic() + PATIENCE_SECONDS, 0
        while time.monotonic() < deadline:
            try:
                status = await self.service.status(self.session, job)
            except aiohttp.ClientError:
                status = "does not answer"
            gone = gone + 1 if status == GONE else 0
            if status in (OVER_WELL, "failed") or gone == 3:
                return status
            await asyncio.sleep(pause)
        return "under way"

    async def _ends(self, jobs: Sequence[str]) -> list[str]:
        """How all of them ended, within one patience."""
        return await asyncio.gather(*(self._over(job, 0.3) for job in jobs))

    async def _burst(self) -> float:
        jobs: list[str] = []
        each = max(1, int(BURST * self.scale) // BURST_CLIENTS)

        async def client(number: int) -> None:
            jobs.extend([await self._submit(f"burst-{number}", nth) for nth in range(each)])

        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(BURST_CLIENTS)))
        rate = len(jobs) / (time.perf_counter() - began)
        await self._ends(jobs)
        return rate

    async def _through(self, in_flight: int, jobs: int) -> tuple[float, float]:
        left, taken = iter(range(jobs)), list[float]()

        async def client(number: int) -> None:
            for nth in left:
                began = time.perf_counter()
                job = await self._submit(f"level-{in_flight}-{number}", nth)
                status = await self._over(job, max(0.01, in_flight * 0.005))
                if status != OVER_WELL or not await self.service.picture(self.session, job):
                    raise SystemExit(f"{self.service.label}: {job} is {status}")
                taken.append(time.perf_counter() - began)

        began = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(in_flight)))
        return jobs / (time.perf_counter() - began), statistics.median(taken) * 1e3

    async def _crowd(self) -> tuple[int, int, float]:
        """How many of the crowd were taken; how many of them ended first; seconds the other one waited."""
        crowd = []
        for _ in range(CROWD):
            try:
                crowd.append(await self.service.submit(self.session, "busy", next(self.colors)))
            except Refused:
                continue
        began = time.perf_counter()
        other = await self._submit("other", 0)
        await self._over(other, 0.01)
        waited = time.perf_counter() - began
        before = [job for job in crowd if await self.service.status(self.session, job) == OVER_WELL]
        await self._ends(crowd)
        return len(crowd), len(before), waited

    async def _thirty(self, trouble: Callable[[], Awaitable[None]]) -> tuple[int, int, int]:
        jobs = [await self._submit(f"thirty-{time.time():.0f}", nth) for nth in range(THIRTY)]
        await self._ends(jobs[:WHEN_OVER])
        await trouble()
        known = sum([await self.service.status(self.session, job) != GONE for job in jobs])
        ends = await self._ends(jobs)
        over = [job for job, end in zip(jobs, ends, strict=True) if end == OVER_WELL]
        pictures = [job for job in over if await self.service.picture(self.session, job)]
        return known, len(over), len(pictures)

    async def _killed(self) -> None:
        self.service.kill()
        self.service.launch()
        await self._answers()

    async def _answers(self) -> None:
        """Wait until it is there again, without asking for anything."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            try:
                await self.service.status(self.session, str(uuid4()))
                return
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)

    async def _comfyui_restarted(self) -> None:
        await self._simulator("forget", {})


# ------------------------------------------------------------------ the command


def main() -> None:
    given = _command()
    with servers.place(given.dir) as place, servers.simulator(place) as comfyui:
        place.environ["FORGE_RATE_PER_HOUR"] = "0"
        where = harness.environment(place.root)
        found = asyncio.run(_all(given, place, comfyui))
    jobs = "/".join(str(max(level, count // 10 if given.short else count)) for level, count in LEVELS.items())
    how = f"one run, 1/10/100 in flight with {jobs} jobs"
    harness.show("peers", where, how, [_table(found)])
    harness.write(given.json, "peers", where, rows=found)


def _command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--peer", nargs=2, action="append", default=[], metavar=("LABEL", "COMMAND"))
    parser.add_argument("--short", action="store_true", help="a tenth of the jobs, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--dir", type=Path, help="where the servers keep their files [/var/tmp]")
    return parser.parse_args()


async def _all(given: argparse.Namespace, place: servers.Place, comfyui: str) -> list[Row]:
    peers = [ComfyV2(place, comfyui, label, command) for label, command in given.peer]
    services: list[Service] = [Bare(comfyui), *peers, Forge(place, comfyui)]
    rows = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for service in services:
            service.launch()
            try:
                rows.append(await Bench(service, comfyui, session, 0.1 if given.short else 1.0).run())
            finally:
                service.kill()
    return rows


def _table(found: list[Row]) -> Table:
    table = Table(title="the same work, in front of one simulator")
    table.add_column("what")
    for row in found:
        table.add_column(row.label, justify="right")

    def add(what: str, shown: Callable[[Row], str]) -> None:
        table.add_row(what, *(shown(row) for row in found))

    add("accepted /s, 10 clients", lambda row: f"{row.burst_per_second:.0f}")
    for level in LEVELS:
        add(f"jobs /s, {level} in flight", lambda row, at=level: f"{row.jobs_per_second[at]:.1f}")
    for level in LEVELS:
        add(f"p50 ms, {level} in flight", lambda row, at=level: f"{row.p50_ms[at]:.0f}")
    add("killed: known, completed, readable of 30", lambda row: _three(row.killed))
    add("ComfyUI restarted: the same", lambda row: _three(row.comfyui_restarted))
    add("of 32 jobs of one user taken", lambda row: str(row.crowd_taken))
    add("of them over before the other user's", lambda row: str(row.crowd_before))
    add("seconds the other user waited", lambda row: f"{row.crowd_seconds:.1f}")
    return table


def _three(counts: tuple[int, int, int]) -> str:
    return ", ".join(str(count) for count in counts)


if __name__ == "__main__":
    main()
