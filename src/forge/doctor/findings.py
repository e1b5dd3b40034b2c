"""What a check has to say, and how it says it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum

import msgspec

from forge.doctor.facts import Facts

Verdict = tuple["Level", str, str]
"""Level, what was found, remedy."""

Verdicts = Iterator[Verdict]
Check = Callable[[Facts], Verdicts]


class Level(StrEnum):
    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    FAILURE = "failure"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check has to say, and for what is wrong the command or act that mends it."""

    check: str
    level: Level
    found: str
    remedy: str = ""


def ok(found: str) -> Verdict:
    return Level.OK, found, ""


def warning(found: str, remedy: str) -> Verdict:
    return Level.WARNING, found, remedy


def failure(found: str, remedy: str) -> Verdict:
    return Level.FAILURE, found, remedy


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
