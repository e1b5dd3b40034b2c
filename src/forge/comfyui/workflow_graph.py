"""What a graph in ComfyUI's API format must be before any ComfyUI sees it.

A graph is `{node id: {class_type, inputs}}`; an input is a plain value or a link `[node id, output index]`.
A node without `inputs` kills ComfyUI's worker thread for everybody, even one that no output depends on; so
every node is checked, and the ones that nothing needs are dropped.
"""

from __future__ import annotations

import graphlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

Graph = dict[str, Any]


class NameTwice(ValueError):
    """A JSON object holds the same name twice."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"{json.dumps(name)} is there twice")


class GraphProblem(msgspec.Struct, frozen=True):
    """What is wrong with one node, or with the file when `node` is empty."""

    node: str
    message: str


def parse(text: str) -> Any:
    """Decode JSON strictly: no name twice, no NaN.

    Raises:
        ValueError: as json.JSONDecodeError, which knows the line, or NameTwice.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)


def problems(graph: Any) -> Iterator[GraphProblem]:
    """Everything that keeps the graph from running, node by node."""
    if not isinstance(graph, dict) or not graph:
        yield GraphProblem("", "must be an object of nodes in ComfyUI's API format")
        return
    if isinstance(graph.get("nodes"), list):
        yield GraphProblem("", "is a saved workflow; export it from ComfyUI with Export (API)")
        return
    sound = True
    for node_id, node in graph.items():
        for message in _node_problems(graph, node):
            sound = False
            yield GraphProblem(node_id, message)
    if sound:
        yield from _cycle(graph)


def node_line(text: str, node_id: str, *, last: bool = False) -> int:
    """The line of a JSON text on which a node begins; 1 where that cannot be seen."""
    begins = re.compile(rf"^\s*{re.escape(json.dumps(node_id))}\s*:")
    found = [number for number, line in enumerate(text.splitlines(), start=1) if begins.match(line)]
    return found[-1 if last else 0] if found else 1


def is_link(value: object) -> bool:
    """Whether an input comes from another node instead of being a plain value."""
    return isinstance(value, list)


def bypass(graph: Graph, node_id: str, passed: Sequence[str]) -> Graph:
    """The graph without a node: who used its output *i* now uses what came in at its input `passed[i]`."""
    inputs = graph[node_id]["inputs"]

    def relinked(value: Any) -> Any:
        return inputs[passed[value[1]]] if is_link(value) and value[0] == node_id else value

    return {
        other: {**node, "inputs": {name: relinked(value) for name, value in node["inputs"].items()}}
        for other, node in graph.items()
        if other != node_id
    }


def outputs_used(graph: Graph, node_id: str) -> set[int]:
    """Which outputs of a node other nodes are linked to."""
    values = (value for node in graph.values() for value in node["inputs"].values())
    return {value[1] for value in values if is_link(value) and value[0] == node_id}


def _node_problems(graph: Graph, node: object) -> Iterator[str]:
    if not isinstance(node, dict):
        yield "must be an object with class_type and inputs"
        return
    if not isinstance(node.get("class_type"), str) or not node["class_type"]:
        yield "has no class_type"
    if not isinstance(node.get("inputs"), dict):
        yield "has no inputs object, which would stop ComfyUI for everybody"
        return
    for name, value in node["inputs"].items():
        if isinstance(value, dict):
            yield f"input {name} is an object; only values and links run everywhere"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"input {name} is a number too large to be one"
        elif is_link(value) and not _resolves(graph, value):
            yield f"input {name} is linked to {json.dumps(value)[:80]}, which is not [node id, output index]"


def _resolves(graph: Graph, link: list[Any]) -> bool:
    return (
        len(link) == 2
        and isinstance(link[0], str)
        and link[0] in graph
        and type(link[1]) is int
        and link[1] >= 0
    )


def _cycle(graph: Graph) -> Iterator[GraphProblem]:
    try:
        graphlib.TopologicalSorter({node_id: _sources(node) for node_id, node in graph.items()}).prepare()
    except graphlib.CycleError as error:
        cycle: list[str] = error.args[1]
        yield GraphProblem(cycle[0], f"depends on itself: {' → '.join(cycle)}")


def _sources(node: dict[str, Any]) -> list[str]:
    return [value[0] for value in node["inputs"].values() if is_link(value)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise NameTwice(next(name for name in names if names.count(name) > 1))
    return result


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is not a number that JSON knows")
