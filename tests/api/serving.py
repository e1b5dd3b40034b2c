"""One API that listens on a free port, and what it is made of."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import uvicorn
from nats.aio.client import Client

from forge import database
from forge.admissions import Admissions
from forge.api.app import create_app
from forge.api.gate import Gate
from forge.api.live import Live
from forge.api.parts import Parts
from forge.api.reads import ReadCounter
from forge.api.serving import configuration
from forge.comfyui.workflows import load
from forge.commands import Jobs
from forge.domain.dispatch import Line
from forge.eventstore import EventStore
from forge.images import Workshop
from forge.keys import Keys
from forge.library import Library, Shelf
from forge.resources import Capacity
from forge.retention import Retention
from forge.settings import Settings
from forge.store import Store
from forge.uploads import Uploads
from waiting import wait_until

ROOT = "/api/v1/comfyui"


class Served:
    """An API that listens, and what it is made of."""

    def __init__(self, parts: Parts, base_url: str, gate: Gate) -> None:
        self.parts, self.base_url, self.gate = parts, base_url, gate

    @property
    def socket_url(self) -> str:
        return self.base_url.replace("http", "ws", 1) + ROOT + "/events"

    def client(self, user: str | None = None, key: str | None = None) -> httpx.AsyncClient:
        """A client that speaks for a user; paths are relative to the API's root."""
        headers = {} if user is None else {"X-Forge-User": user}
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.AsyncClient(base_url=self.base_url + ROOT, headers=headers, timeout=60.0)


Serve = Callable[..., Awaitable[Served]]


async def parts_over(
    stack: AsyncExitStack, nc: Client, pool: database.Pool, settings: Settings, open_to_loopback: bool
) -> Parts:
    store = EventStore(nc)
    capacity = Capacity(settings)
    blobs = Store(settings.assets_dir)
    blobs.open()
    admissions = Admissions(
        store,
        Line(),
        queue_limit=settings.queue_limit,
        rate_per_hour=settings.rate_per_hour,
        shelf=Shelf(store, blobs, settings.ttl_of),
        guard=capacity.room,
    )
    return Parts(
        settings=settings,
        nc=nc,
        store=store,
        admissions=admissions,
        jobs=Jobs(store),
        library=Library(store),
        uploads=Uploads(store),
        keys=Keys(store),
        reads=ReadCounter(store, "test"),
        retention=Retention(store, pool, blobs, settings),
        pool=pool,
        workflows=load(settings.workflows_dir),
        blobs=blobs,
        capacity=capacity,
        workshop=await stack.enter_async_context(Workshop()),
        live=Live(nc, admissions, pool, snapshot_events=settings.snapshot_events),
        open_to_loopback=open_to_loopback,
    )


@asynccontextmanager
async def listening(parts: Parts) -> AsyncIterator[tuple[str, Gate]]:
    app = create_app(parts)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(configuration(app, "127.0.0.1", 0))
    task = asyncio.create_task(server._serve([listener]))
    await wait_until(lambda: server.started or task.done(), what="uvicorn listens")
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", app
    parts.live.close()
    server.should_exit = True
    await asyncio.wait_for(task, 30)
