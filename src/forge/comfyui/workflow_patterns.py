"""Patterns such as `{gender}_{age}_{expression}`: text with the names of params in braces.

`{{` and `}}` stand for a brace itself. A pattern only ever inserts whole values; it has no conditions,
formats or calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TOKEN = re.compile(r"\{\{|\}\}|" + _PLACEHOLDER.pattern + r"|[{}]")
# What may touch a client's text. Anything else could join with it to `embedding:` or other syntax.
_BEFORE = re.compile(r"(?:^|[\s,(])$")
_AFTER = re.compile(r"$|[\s,.)]|:\d+(?:\.\d+)?\)")


def names(pattern: str) -> list[str]:
    """The params a pattern names, in order."""
    return [found[1] for found in _TOKEN.finditer(pattern) if found[1]]


def stray_brace(pattern: str) -> bool:
    """Whether a brace is neither doubled nor part of a `{name}`."""
    return any(found[0] in ("{", "}") for found in _TOKEN.finditer(pattern))


def glued(pattern: str) -> Iterator[str]:
    """The params whose values would touch more than a space or a separator."""
    for found in _TOKEN.finditer(pattern):
        if found[1] and not (_BEFORE.search(pattern[: found.start()]) and _AFTER.match(pattern, found.end())):
            yield found[1]


def fill(pattern: str, value: Callable[[str], str]) -> str | None:
    """The pattern with every `{name}` replaced by `value(name)`; None when one of them is empty."""
    values = {name: value(name) for name in names(pattern)}
    if not all(values.values()):
        return None
    return _TOKEN.sub(lambda found: values[found[1]] if found[1] else found[0][0], pattern)
