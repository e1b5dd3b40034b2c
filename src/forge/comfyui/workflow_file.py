"""A job type's TOML file: its shape, and the line on which each key stands.

Text in; out come a :class:`Definition` and every problem of the file, each with its path of keys, so that a
message can name the line.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from forge.domain.params import Param

Path = tuple[str, ...]
Read = TypeVar("Read", bound=msgspec.Struct)

_HEADER = re.compile(r"^\s*\[\[?([^\[\]]+)\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)


class FileProblem(msgspec.Struct, frozen=True):
    """What is wrong at one key of the file."""

    path: Path
    message: str


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model file that the operator chooses, never a client.

    Where none is chosen, `bypass_node` is taken out of the graph and its outputs come from `bypass_inputs`.
    """

    targets: tuple[str, ...]
    description: str = ""
    default: str = ""
    strength_targets: tuple[str, ...] = ()
    bypass_node: str = ""
    bypass_inputs: tuple[str, ...] = ()


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """What NAME.toml says."""

    asset_type: str
    description: str
    timeout_seconds: float
    outputs: tuple[str, ...]
    pictures: int | str | None = None
    estimated_bytes: int = 2_000_000
    params: dict[str, Param] = {}
    compose: dict[str, tuple[str, ...]] = {}
    labels: dict[str, str] = {}
    models: dict[str, Model] = {}


# What stands in for a value that could not be read, so that the rest of the file is still looked at.
_UNREAD: dict[str, Any] = {"asset_type": "", "description": "", "timeout_seconds": 0.0, "outputs": ()}
_UNREAD_PARAM = Param(type="choice", choices=("unread",))
_UNREAD_MODEL = Model(targets=())


def decode(raw: dict[str, Any]) -> tuple[Definition, list[FileProblem]]:
    """The definition as far as it can be read; and every key that is unknown, missing or of a wrong type."""
    problems: list[FileProblem] = []
    tables = {key: _table(raw, key, problems) for key in ("params", "compose", "models")}
    values = {
        "params": _entries(tables["params"], _UNREAD_PARAM, "params", problems),
        "models": _entries(tables["models"], _UNREAD_MODEL, "models", problems),
        "compose": {target: _parts(parts) for target, parts in tables["compose"].items()},
    }
    read = _fields({**raw, **values}, Definition, (), problems)
    return Definition(**{**_UNREAD, **read}), problems


def lines(text: str) -> dict[Path, int]:
    """The line of each key of a TOML text; inside multi-line values only a guess."""
    found: dict[Path, int] = {}
    table: Path = ()
    for number, line in enumerate(text.splitlines(), start=1):
        header, key = _HEADER.match(line), _KEY.match(line)
        if header:
            table = _path(header[1])
        path = table if header else (*table, *_path(key[1])) if key else ()
        for end in range(1, len(path) + 1):
            found.setdefault(path[:end], number)
    return found


def line(found: dict[Path, int], path: Path) -> int:
    """The line of a key, or of the nearest table around it."""
    while path and path not in found:
        path = path[:-1]
    return found.get(path, 1)


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` where one of the known names is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _table(raw: dict[str, Any], key: str, problems: list[FileProblem]) -> dict[str, Any]:
    value = raw.get(key, {})
    if isinstance(value, dict):
        return value
    problems.append(FileProblem((key,), "must be a table"))
    return {}


def _entries(table: dict[str, Any], unread: Read, name: str, problems: list[FileProblem]) -> dict[str, Read]:
    entries = {}
    for key, value in table.items():
        before = len(problems)
        if isinstance(value, dict):
            read = _fields(value, type(unread), (name, key), problems)
        else:
            problems.append(FileProblem((name, key), f"must be a table, [{name}.{key}]"))
        entries[key] = type(unread)(**read) if len(problems) == before else unread
    return entries


def _fields(
    table: dict[str, Any], shape: type[msgspec.Struct], path: Path, problems: list[FileProblem]
) -> dict[str, Any]:
    """Convert field by field: one wrong value must not hide the others."""
    fields = {field.name: field for field in msgspec.structs.fields(shape)}
    problems += [
        FileProblem((*path, key), f"there is no key {key}{suggestion(key, fields)}")
        for key in table
        if key not in fields
    ]
    values = {}
    for name, field in fields.items():
        if name in table:
            try:
                values[name] = msgspec.convert(table[name], field.type)
            except msgspec.ValidationError as error:
                problems.append(FileProblem((*path, name), f"{name}: {str(error).lower()}"))
        elif field.required:
            problems.append(FileProblem((*path, name), f"{name} is missing"))
    return values


def _parts(value: object) -> object:
    """A single pattern is a list of one."""
    return [value] if isinstance(value, str) else value


def _path(dotted: str) -> Path:
    """The keys of `a."b.c"`, read by the TOML parser itself."""
    try:
        value: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return ()
    keys: list[str] = []
    while isinstance(value, dict):
        (key,) = value
        keys.append(key)
        value = value[key]
    return tuple(keys)
