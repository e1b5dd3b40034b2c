"""`compose.yml` as Docker Compose would read it: merged, with its variables filled in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "compose.yml").read_text()

_VARIABLE = re.compile(r"\$\{(?P<name>[A-Z_]+):-(?P<default>[^}]*)\}")


def variables() -> dict[str, str]:
    """Every variable that may be set, with its default."""
    return {found["name"]: found["default"] for found in _VARIABLE.finditer(TEXT)}


def compose(environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The whole document."""
    given = environ or {}

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: filled(value) for key, value in node.items()}
        if isinstance(node, list):
            return [filled(value) for value in node]
        if isinstance(node, str):
            return _VARIABLE.sub(lambda found: given.get(found["name"]) or found["default"], node)
        return node

    document: dict[str, Any] = filled(yaml.safe_load(TEXT))
    return document


def services() -> dict[str, Any]:
    return dict(compose()["services"])


def of_forge() -> Iterator[tuple[str, dict[str, Any]]]:
    """The services that run forge's own image."""
    for name, service in services().items():
        if service.get("build", {}).get("target") == "forge":
            yield name, service
