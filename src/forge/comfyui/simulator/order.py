"""Which nodes of a prompt run, and in which order."""

from __future__ import annotations

from forge.comfyui.simulator.queue import Item


def order_of(item: Item, cached: set[str]) -> list[str]:
    """The nodes to run, in order: as soon as they are ready, outputs first, then what an output waits for."""
    links: dict[str, set[str]] = {}
    waiting = [node_id for node_id in item.outputs if node_id not in cached]
    while waiting:
        node_id = waiting.pop()
        if node_id in links:
            continue
        inputs = item.graph[node_id]["inputs"].values()
        sources = {value[0] for value in inputs if isinstance(value, list) and len(value) == 2}
        links[node_id] = sources - cached
        waiting += links[node_id]
    outputs = set(item.outputs)
    plan: list[str] = []
    left = [node_id for node_id in item.graph if node_id in links]
    while left:
        done = set(plan)
        ready = [node_id for node_id in left if links[node_id] <= done]
        awaited = {source for node_id in left if node_id in outputs for source in links[node_id]}
        chosen = min(ready, key=lambda node_id: (node_id not in outputs, node_id not in awaited))
        plan.append(chosen)
        left.remove(chosen)
    return plan
