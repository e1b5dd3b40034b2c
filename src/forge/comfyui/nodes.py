"""Whether a ComfyUI can run a graph at all: it has the node classes, and the files and names they are given.

ComfyUI says the same only when a prompt is sent, which is when a job fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from forge.comfyui.workflow_graph import Graph


def classes(graph: Graph) -> set[str]:
    """The node classes a graph is made of."""
    return {node["class_type"] for node in graph.values()}


def lacking(graph: Graph, info: Mapping[str, Mapping[str, Any]], slots: Collection[str]) -> list[str]:
    """What a ComfyUI lacks for a graph.

    Args:
        info: node class → what `/object_info/{class}` says of it, empty where there is none.
        slots: inputs, as `node.input`, whose value comes with each job.
    """
    return sorted({what for id_, node in graph.items() for what in _lacking(id_, node, info, slots)})


def _lacking(
    id_: str, node: dict[str, Any], info: Mapping[str, Mapping[str, Any]], slots: Collection[str]
) -> Iterator[str]:
    known = info.get(node["class_type"])
    if not known:
        yield f"there is no node {node['class_type']}"
        return
    inputs = known.get("input", {})
    described = {**inputs.get("required", {}), **inputs.get("optional", {})}
    for name, value in node["inputs"].items():
        if isinstance(value, list) or f"{id_}.{name}" in slots:  # a link; what a job brings along
            continue
        options = _options(described.get(name))
        if options is not None and value not in options:
            yield f"{node['class_type']} has no {name} {value!r}"


def _options(described: Any) -> list[Any] | None:
    """The values an input may have, where they are listed: in place of its type, or beside it."""
    if not isinstance(described, list) or not described:
        return None
    more = described[1] if len(described) > 1 and isinstance(described[1], dict) else {}
    if more.get("image_upload"):
        return None
    options = described[0] if isinstance(described[0], list) else more.get("options")
    return options if isinstance(options, list) else None
