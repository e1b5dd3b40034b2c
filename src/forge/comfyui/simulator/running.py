"""One prompt while it runs: what it has made so far, and what it tells whom."""

from __future__ import annotations

import time
from typing import Any

from forge.comfyui.simulator.queue import Item
from forge.comfyui.simulator.sockets import Sockets


class Run:
    """One prompt while it executes: messages so far, outputs so far, progress of each node."""

    def __init__(self, item: Item, sockets: Sockets, *, noise: bool) -> None:
        self.item = item
        self.outputs: dict[str, Any] = {}
        self.values: dict[str, tuple[Any, ...]] = {}
        self.executed: list[str] = []
        self.messages: list[list[Any]] = []
        self.progress: dict[str, dict[str, Any]] = {}
        self._sockets = sockets
        self._noise = noise

    @property
    def prompt_id(self) -> str:
        return self.item.prompt_id

    def message(self, event: str, facts: dict[str, Any], *, everybody: bool = False) -> None:
        """A message that history keeps, too."""
        data = {"prompt_id": self.prompt_id, **facts, "timestamp": int(time.time() * 1000)}
        if event == "execution_cached":
            data = {"nodes": facts["nodes"], "prompt_id": self.prompt_id, "timestamp": data["timestamp"]}
        self.messages.append([event, data])
        if self.item.client_id is not None or everybody:
            self._sockets.send(event, data, self.item.client_id)

    def tell_owner(self, event: str, data: dict[str, Any]) -> None:
        if self.item.client_id is not None:
            if self._noise:
                self._sockets.send("forge.unheard_of", {"any": ["thing", None]}, self.item.client_id)
                data = {**data, "unheard_of": {"extra": True}}
            self._sockets.send(event, data, self.item.client_id)

    def tell_progress(self, node_id: str, value: float, limit: float, state: str) -> None:
        """`progress_state` of every node started so far; without an owner it goes to everybody."""
        self.progress[node_id] = {
            "value": value,
            "max": limit,
            "state": state,
            "node_id": node_id,
            "prompt_id": self.prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        data = {"prompt_id": self.prompt_id, "nodes": self.progress}
        self._sockets.send("progress_state", data, self.item.client_id)

    def tell_step(self, node_id: str, step: int, steps: int) -> None:
        data = {"value": step, "max": steps, "prompt_id": self.prompt_id, "node": node_id}
        self._sockets.send("progress", data, self.item.client_id)

    def show(self, node_id: str, shown: dict[str, Any]) -> None:
        self.outputs[node_id] = shown
        self.tell_owner(
            "executed",
            {"node": node_id, "display_node": node_id, "output": shown, "prompt_id": self.prompt_id},
        )

    def entry(self, status_str: str) -> dict[str, Any]:
        """What history keeps of this run."""
        entry = {
            "prompt": list(self.item),
            "outputs": self.outputs,
            "status": {
                "status_str": status_str,
                "completed": status_str == "success",
                "messages": self.messages,
            },
            "meta": {
                node_id: {
                    "node_id": node_id,
                    "display_node": node_id,
                    "parent_node": None,
                    "real_node_id": node_id,
                }
                for node_id in self.outputs
            },
        }
        return entry | {"unheard_of": [1]} if self._noise else entry
