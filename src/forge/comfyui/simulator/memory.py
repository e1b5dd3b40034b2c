"""Everything a ComfyUI process forgets when it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

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

    def start(self, on_crash: Callable[[], None]) -> None:
        """Begin to work. A dead worker goes unnoticed; a dead publisher ends the process."""
        publisher = asyncio.create_task(self.sockets.publish(), name="comfyui publisher")
        publisher.add_done_callback(lambda task: None if task.cancelled() else on_crash())
        self._tasks = [asyncio.create_task(self.worker.run(), name="comfyui worker"), publisher]

    async def end(self) -> None:
        """Stop both tasks, whatever ended them before."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
