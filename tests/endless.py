"""A role of a worker that runs beside a test, on its own connection, and ends as a killed process would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from nats.aio.client import Client

from forge.broker import connect
from forge.embedded import EmbeddedNats


@asynccontextmanager
async def beside(
    server: EmbeddedNats, name: str, run: Callable[[Client], Coroutine[Any, Any, None]]
) -> AsyncIterator[asyncio.Task[None]]:
    nc = await connect(server.url, name)
    task = asyncio.create_task(run(nc))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await nc.close()
