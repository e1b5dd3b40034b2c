"""Progress of a running prompt, told on core NATS: stale after a second, so the latest wins."""

from __future__ import annotations

import asyncio
from typing import Self

import msgspec
from nats.aio.client import Client

from forge.comfyui.protocol import Progress
from forge.topology import progress
from forge.workers.orders import Order

_INTERVAL_SECONDS = 0.1


class Feed:
    """Publishes the newest progress of one attempt, ten times a second at most; use inside ``async with``."""

    def __init__(self, nc: Client, order: Order) -> None:
        self._nc, self._order = nc, order
        self._latest: Progress | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def update(self, latest: Progress) -> None:
        """Take note; it is told as soon as the interval allows."""
        self._latest = latest
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._tell(), name=f"progress of {self._order.job_id}")

    async def _tell(self) -> None:
        while (latest := self._latest) is not None:
            self._latest = None
            told = {
                "job_id": self._order.job_id,
                "user_id": self._order.user_id,
                "attempt": self._order.attempt,
                "value": latest.value,
                "max": latest.max,
                "node": latest.node,
            }
            await self._nc.publish(progress(self._order.job_id), msgspec.json.encode(told))
            await asyncio.sleep(_INTERVAL_SECONDS)
