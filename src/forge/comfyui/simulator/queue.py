"""The prompts a ComfyUI holds in memory: waiting, running, finished. A restart empties all of it."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

HISTORY_LIMIT = 10_000


class Item(NamedTuple):
    """One submitted prompt, compared as the server does: by number, by id, and then by graph, which fails."""

    number: float
    prompt_id: str
    graph: dict[str, Any]
    extra_data: dict[str, Any]
    outputs: list[str]

    @property
    def client_id(self) -> Any:
        return self.extra_data.get("client_id")


class PromptQueue:
    """A heap of waiting prompts, at most one running, and the history of ended ones.

    Args:
        on_change: called after everything that changes how many prompts are waiting or running.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.number = 0
        self.running: Item | None = None
        self.history: dict[str, Any] = {}
        self._heap: list[Item] = []
        self._arrived = asyncio.Event()
        self._on_change = on_change

    @property
    def pending(self) -> list[Item]:
        """Waiting prompts in heap order, which is not sorted."""
        return self._heap

    @property
    def remaining(self) -> int:
        return len(self._heap) + (self.running is not None)

    def status(self) -> dict[str, Any]:
        """How many prompts are left, in the shape `status` messages and `GET /prompt` use."""
        return {"exec_info": {"queue_remaining": self.remaining}}

    def next_number(self) -> int:
        """The counter that every POST without a number moves, rejected ones too."""
        number = self.number
        self.number += 1
        return number

    def put(self, item: Item) -> None:
        """Queue a prompt. An equal number and id raises TypeError after queueing it, as on the server."""
        try:
            heapq.heappush(self._heap, item)
        finally:
            self._arrived.set()
            self._on_change()

    async def take(self) -> Item:
        """Wait for the prompt with the lowest number and make it the running one."""
        while not self._heap:
            self._arrived.clear()
            await self._arrived.wait()
        self.running = heapq.heappop(self._heap)
        self._on_change()
        return self.running

    def finish(self, entry: dict[str, Any]) -> None:
        """Move the running prompt into history in one step."""
        assert self.running is not None
        prompt_id, self.running = self.running.prompt_id, None
        if len(self.history) > HISTORY_LIMIT:
            del self.history[next(iter(self.history))]
        self.history[prompt_id] = entry
        self._on_change()

    def delete(self, prompt_id: str) -> bool:
        """Remove one waiting prompt of that id; False when there is none."""
        for index, item in enumerate(self._heap):
            if item.prompt_id == prompt_id:
                del self._heap[index]
                heapq.heapify(self._heap)
                self._on_change()
                return True
        return False

    def clear(self) -> list[Item]:
        """Remove every waiting prompt and return them."""
        removed, self._heap = self._heap, []
        self._on_change()
        return removed

    def listing(self, max_items: int | None, offset: int) -> dict[str, Any]:
        """A page of history, oldest first; without an offset the newest `max_items`."""
        total = len(self.history)
        if offset < 0 and max_items is not None:
            offset = total - max_items
        first = max(offset, 0)
        last = total if max_items is None else max(offset + max_items, 0)
        ids: Iterable[str] = list(self.history)[first:last] if max_items is None or max_items > 0 else []
        return {prompt_id: self.history[prompt_id] for prompt_id in ids}
