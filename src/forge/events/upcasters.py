"""Upcasters: (type, version n) → a function from the plain dict of version n to that of n + 1.

Golden files under ``tests/events/golden`` hold one body per (type, version); all must decode for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {}
