"""Cursors: where a page of a list ended, opaque to clients and good for that very list only."""

from __future__ import annotations

import base64
import hashlib
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, TypeVar

import msgspec

from forge.api.edge import invalid

T = TypeVar("T")

Micros = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799_000_000)]
"""A time in a cursor: microseconds since 1970, at most the year 9999."""

Number = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def micros(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1)


def moment(at: int) -> datetime:
    return _EPOCH + timedelta(microseconds=at)


def tag(*of: Any) -> str:
    """A short mark of a list: its name, filters and order."""
    return hashlib.sha256(msgspec.json.encode(of)).hexdigest()[:12]


def write(mark: str, *key: Any) -> str:
    """The cursor behind the row with this key."""
    return base64.urlsafe_b64encode(msgspec.json.encode((mark, key))).decode().rstrip("=")


def read(mark: str, cursor: str | None, types: type[T]) -> T | None:
    """The key in a cursor.

    Raises:
        Invalid: it is not a cursor, or one of another list.
    """
    if cursor is None:
        return None
    try:
        raw = base64.b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4), b"-_", validate=True)
        given, key = msgspec.json.decode(raw, type=tuple[str, msgspec.Raw])
        if given == mark:
            return msgspec.json.decode(key, type=types)
    except (ValueError, msgspec.DecodeError, RecursionError):
        pass
    raise invalid("cursor", "is not a cursor of this list with these filters; begin without one")
