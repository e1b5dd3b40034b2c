"""The result cache: node results of the last prompt, found again by content."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import blake2b
from typing import Any, NamedTuple


class Result(NamedTuple):
    """What a node made: its output values, and what it shows in history (None when it shows nothing)."""

    values: tuple[Any, ...]
    shown: dict[str, Any] | None


class ResultCache:
    """Results keyed by signature; ids of nodes play no part, content does."""

    def __init__(self) -> None:
        self._results: dict[str, Result] = {}

    def keep_only(self, signatures: dict[str, str]) -> None:
        """Drop every result the coming prompt does not name."""
        wanted = set(signatures.values())
        self._results = {key: result for key, result in self._results.items() if key in wanted}

    def get(self, signature: str) -> Result | None:
        return self._results.get(signature)

    def put(self, signature: str, result: Result) -> None:
        self._results[signature] = result

    def clear(self) -> None:
        self._results.clear()


def signatures(graph: dict[str, Any], fingerprint: Callable[[str], str]) -> dict[str, str]:
    """One signature per node: its class, its inputs, and the signatures of the nodes it links to.

    Args:
        fingerprint: names the content of the file a LoadImage reads.

    Raises:
        KeyError: a node without `inputs`. It ends the server's worker thread, and this one's too.
    """
    found: dict[str, str] = {}
    for node_id in graph:
        _sign(node_id, graph, fingerprint, found, ())
    return found


def _sign(
    node_id: str,
    graph: dict[str, Any],
    fingerprint: Callable[[str], str],
    found: dict[str, str],
    path: tuple[str, ...],
) -> str:
    if node_id in found:
        return found[node_id]
    if node_id not in graph or node_id in path:
        return "nowhere"  # only nodes no output depends on can link to nothing or in circles
    node = graph[node_id]
    inputs = {
        name: [_sign(value[0], graph, fingerprint, found, (*path, node_id)), value[1]]
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
        else value
        for name, value in node["inputs"].items()
    }
    if node["class_type"] in ("LoadImage", "LoadImageMask"):
        inputs["__content__"] = fingerprint(str(inputs.get("image")))
    text = json.dumps([node["class_type"], inputs], sort_keys=True)
    found[node_id] = blake2b(text.encode(), digest_size=16).hexdigest()
    return found[node_id]
