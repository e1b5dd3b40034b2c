"""Everything a ComfyUI process forgets when it ends."""

from __future__ import annotations

import asyncio
import contextlib

from forge.comfyui.simulator.queue import PromptQueue
from forge.comfyui.simulator.sockets import Sockets
from forge.comfyui.simulator.worker import Worker


class Memory:
    """Queue, sockets and worker of one life, with the two tasks that drive them."""

    def __init__(self, queue: PromptQueue, sockets: Sockets, worker: Worker) -> None:
        self.queue = queue
        self.sockets = sockets
        self.worker = worker
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self.worker.run(), name="comfyui worker"),
            asyncio.create_task(self.sockets.publish(), name="comfyui publisher"),
        ]

    async def end(self) -> None:
        """Stop both tasks. A worker that died of a poisoned prompt is no error: the real one dies, too."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
