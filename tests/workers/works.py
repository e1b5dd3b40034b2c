"""The insides of a forge that draws, on real servers: log, orders, dispatcher, generation workers, volume."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import msgspec
import pytest
from nats.aio.client import Client

from comfyui.conformance.comfy_server import flat
from factories import request
from forge.admissions import Admissions
from forge.broker import connect
from forge.broker import request as ask
from forge.comfyui.backends import Backends
from forge.comfyui.folders import shared
from forge.comfyui.patience import Patience
from forge.comfyui.simulator import Simulator
from forge.comfyui.workflows import Workflow
from forge.commands import Jobs, Loaded
from forge.domain.dispatch import Line
from forge.domain.ids import prompt_id
from forge.domain.jobs import Cancel
from forge.embedded import EmbeddedNats
from forge.events.assets import AssetReady, AssetStored
from forge.events.catalogue import Event
from forge.events.jobs import JobCancelled, JobCompleted, JobFailed
from forge.eventstore import EventStore
from forge.follower import follow
from forge.images import Workshop
from forge.library import Library, Shelf
from forge.resources import Capacity
from forge.settings import Settings
from forge.store import Store
from forge.topology import ALL_EVENTS, DISPATCH
from forge.uploads import Uploads
from forge.workers.attempt import Studio
from forge.workers.dispatcher import Dispatcher
from forge.workers.generation import Generation
from forge.workers.leftovers import Leftovers
from forge.workers.thumbnails import Thumbnails
from waiting import wait_until

HURRY = Patience(
    connect=5.0,
    read=10.0,
    poll=(0.1, 0.2),
    poll_deaf=(0.02, 0.05),
    poll_first=0.005,
    settle=0.02,
    lost_answer=10.0,
    unreachable=1.0,
    cancel=10.0,
    queue_factor=1.0,
    reconnect=(0.01, 0.05),
    health_interval=0.05,
    health_retry=0.03,
    health_timeout=5.0,
)
"""Soon again where it asks, and in no hurry for answers: a machine may stall."""

Told = tuple[type[Event], ...]
ENDS: Told = (JobCompleted, JobFailed, JobCancelled)


class Hold:
    """A place in the code where whoever comes by waits until it is opened; `reached` tells of the first."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.reached.set()
        await self.opened.wait()

    async def occupied(self) -> None:
        await asyncio.wait_for(self.reached.wait(), 30)


def hold_before(patch: pytest.MonkeyPatch, owner: type, name: str) -> Hold:
    """Let everybody wait who is about to call an async method."""
    hold, real = Hold(), getattr(owner, name)

    async def held(*args: Any, **kwargs: Any) -> Any:
        await hold()
        return await real(*args, **kwargs)

    patch.setattr(owner, name, held)
    return hold


def hold_after(patch: pytest.MonkeyPatch, owner: type, name: str) -> Hold:
    """Let everybody wait whom an async method has just answered."""
    hold, real = Hold(), getattr(owner, name)

    async def held(*args: Any, **kwargs: Any) -> Any:
        answer = await real(*args, **kwargs)
        await hold()
        return answer

    patch.setattr(owner, name, held)
    return hold


def hear_of_refusal(patch: pytest.MonkeyPatch) -> asyncio.Event:
    """Is set when a ComfyUI has not taken a connection for a prompt."""
    refusal, real = asyncio.Event(), Backends.refused

    def refused(backends: Backends, url: str, reason: str) -> None:
        real(backends, url, reason)
        refusal.set()

    patch.setattr(Backends, "refused", refused)
    return refusal


class Works:
    """One forge; `start_worker` as often as workers are wanted, preferred simulator first."""

    def __init__(
        self, nats: EmbeddedNats, nc: Client, stack: AsyncExitStack, simulators: list[Simulator], root: Path
    ) -> None:
        self.nats, self.nc, self.stack, self.simulators = nats, nc, stack, simulators
        self.events = EventStore(nc)
        self.admissions = Admissions(self.events, Line(), queue_limit=1000, rate_per_hour=0)
        self.admissions.caught_up.set()
        self.jobs = Jobs(self.events)
        self.settings = Settings(data_dir=root, memory_limit_bytes=16 * 1024**3)
        self.store = Store(self.settings.assets_dir)
        self.workflows: dict[str, Workflow] = {}
        self.studios: list[Studio] = []
        self.workers: list[asyncio.Task[None]] = []
        self.patience = HURRY
        self.strangers: list[str] = []
        """Prompts of somebody else."""
        self.others: list[UUID] = []
        """Jobs that keep the places while a test is about another."""

    @property
    def simulator(self) -> Simulator:
        return self.simulators[0]

    @property
    def backends(self) -> Backends:
        """As the latest worker knows them."""
        return self.studios[-1].backends

    # ----------------------------------------------------------------- parts

    async def start_worker(self) -> asyncio.Task[None]:
        """Another generation worker."""
        nc = await connect(self.nats.url, "worker")
        self.stack.push_async_callback(nc.close)
        urls = [simulator.url for simulator in self.simulators]
        events, workshop = EventStore(nc), await self.stack.enter_async_context(Workshop())
        studio = Studio(
            worker=f"worker-{len(self.workers)}",
            nc=nc,
            jobs=Jobs(events),
            library=Library(events),
            shelf=Shelf(events, self.store, self.settings.ttl_of),
            uploads=Uploads(events),
            backends=await self.stack.enter_async_context(Backends(urls, self.patience)),
            folders=shared(urls, [simulator.folders.base for simulator in self.simulators]),
            workflows=self.workflows,
            store=self.store,
            workshop=workshop,
            thumbnails=Thumbnails(self.store, workshop),
            ttl_of=self.settings.ttl_of,
            capacity=Capacity(self.settings),
        )
        task = asyncio.create_task(Generation(studio).run(asyncio.Event()))
        self.stack.push_async_callback(ended, task)
        self.studios.append(studio)
        self.workers.append(task)
        return task

    async def start_dispatcher(self) -> None:
        nc = await connect(self.nats.url, "dispatcher")
        self.stack.push_async_callback(nc.close)
        self.stack.push_async_callback(ended, asyncio.create_task(Dispatcher(EventStore(nc)).run()))

    def time_out(self, seconds: float) -> None:
        """Give prompts of the job type so long."""
        swatch = self.workflows["swatch"]
        self.workflows["swatch"] = msgspec.structs.replace(swatch, timeout_seconds=seconds)

    # ------------------------------------------------------------------ jobs

    async def submit(self, color: int = 1) -> UUID:
        asked = request(job_type="swatch", asset_type="ui_icon", params={"color": color})
        [loaded] = await self.admissions.submit("mei", [asked], actor="mei")
        return loaded.job.id

    async def load(self, job: UUID) -> Loaded:
        state = self.admissions.line.jobs[job]
        return await self.jobs.load("mei", job, state.submitted_seq, state.admitted_seq)

    async def cancel(self, job: UUID) -> None:
        await self.jobs.act(await self.load(job), Cancel(), actor="mei", name="cancel")

    async def facts(self, job: UUID) -> list[str]:
        """What happened to a job so far, in words; each only once in an attempt."""
        return [record.event.type.rpartition(".")[2] for record in (await self.load(job)).facts]

    async def happened(self, job: UUID, fact: str, timeout: float = 60.0) -> None:
        async def there() -> bool:
            return fact in await self.facts(job)

        await wait_until(there, timeout, f"{job} {fact}")

    async def facts_include(self, job: UUID, *facts: str) -> bool:
        """Whether all of that happened to the job."""
        return set(facts) <= set(await self.facts(job))

    async def log(self) -> list[Event]:
        """Every event there is."""
        found: list[Event] = []
        async for batch in follow(self.nc, 1, (ALL_EVENTS,)):
            found += [record.event for record in batch.records]
            if batch.caught_up:
                return found
        raise AssertionError("the log ended")

    async def ordered(self, job: UUID) -> bool:
        """Whether the job's order lies in the queue, and so holds a place."""
        info = msgspec.json.decode(await ask(self.nc, f"STREAM.INFO.{DISPATCH}", {"subjects_filter": ">"}))
        return any(subject.endswith(str(job)) for subject in info["state"].get("subjects") or {})

    # --------------------------------------------------------------- ComfyUI

    async def foreign(self, simulator: Simulator | None = None) -> str:
        """A prompt that somebody else has there."""
        id_ = str(uuid4())
        async with aiohttp.ClientSession((simulator or self.simulator).url) as session:
            body = {"prompt": flat("somebody"), "prompt_id": id_}
            async with session.post("/prompt", json=body) as answer:
                assert answer.status == 200
        self.strangers.append(id_)
        return id_

    def present(self, simulator: Simulator | None = None) -> set[str]:
        """The prompts a simulator runs or queues."""
        queue = (simulator or self.simulator).memory.queue
        running = {queue.running.prompt_id} if queue.running is not None else set()
        return running | {item.prompt_id for item in queue.pending}

    async def runs(self, job: UUID, attempt: int = 1) -> None:
        """Wait until a simulator executes the attempt's prompt."""
        wanted = str(prompt_id(job, attempt))

        def running() -> bool:
            queues = [simulator.memory.queue for simulator in self.simulators]
            return any(q.running is not None and q.running.prompt_id == wanted for q in queues)

        await wait_until(running, what=f"{job} runs")

    # ----------------------------------------------------------------- ended

    async def nothing_left(self, job: UUID, attempts: int = 1, timeout: float = 30.0) -> None:
        """Wait until nothing of a job's attempts is anywhere: prompt, history, files, workspace, place."""
        prompts = {str(prompt_id(job, attempt)) for attempt in range(1, attempts + 1)}

        async def remains() -> list[str]:
            found = []
            for simulator in self.simulators:
                found += [f"prompt {id_}" for id_ in prompts & self.present(simulator)]
                found += [f"history {id_}" for id_ in prompts & simulator.memory.queue.history.keys()]
                for kind in ("output", "input"):
                    ours = simulator.folders.path(kind) / "forge" / str(job)
                    found += [folder for folder, _, _ in os.walk(ours)]  # minds no folder that goes meanwhile
            found += [path.name for path in (self.store.root / "tmp").iterdir() if str(job) in path.name]
            return [*found, "its order"] if await self.ordered(job) else found

        last: list[str] = []

        async def nothing() -> bool:
            last[:] = await remains()
            return not last

        try:
            await wait_until(nothing, timeout)
        except AssertionError:
            raise AssertionError(f"still there: {last}") from None

    async def ended_once(self, job: UUID, kind: type[Event]) -> None:
        """The job has exactly one end, and pictures only if it completed."""
        mine = [event for event in await self.log() if getattr(event, "job_id", None) == job]
        assert [type(event) for event in mine if isinstance(event, ENDS)] == [kind]
        pictures = [event for event in mine if isinstance(event, AssetStored | AssetReady)]
        assert bool(pictures) is (kind is JobCompleted)

    async def sweep_leftovers(self) -> None:
        """What the scheduler does now and then."""
        urls = [simulator.url for simulator in self.simulators]
        await Leftovers(
            EventStore(self.nc), urls, [simulator.folders.base for simulator in self.simulators]
        ).sweep()


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def working(
    nats: EmbeddedNats, nc: Client, root: Path, workflows: dict[str, Workflow], simulators: int = 1
) -> AsyncIterator[Works]:
    """A forge without a worker yet."""
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(Simulator()) for _ in range(simulators)]
        works = Works(nats, nc, stack, made, root)
        works.workflows = dict(workflows)
        works.store.open()
        await works.start_dispatcher()
        yield works


Step = Callable[[Works, pytest.MonkeyPatch], Awaitable[UUID]]
