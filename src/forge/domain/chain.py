"""Entries of the log as they were written, and the chain of hashes that holds a copy of it together.

The hash of an entry covers the hash before it, so a copy whose last hash is right is right from its first
entry on. Anybody can compute it: sha256 of the hash before (32 zero bytes before the first) and of the JSON
array ``[seq, subject, [[name, value], …], arrived, data]`` without spaces, headers sorted, ``arrived`` in
RFC 3339 in UTC, ``data`` in Base64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from hashlib import sha256

import msgspec

GENESIS = bytes(32)
"""The hash before the first entry."""

ARRIVED = "Forge-Arrived"
"""The header of a restored message that says when it first arrived: its server has a later time."""


class Entry(msgspec.Struct, frozen=True):
    """One message of the log as it was written; ``arrived`` is its server's time, in microseconds."""

    seq: int
    subject: str
    headers: dict[str, str]
    data: bytes
    arrived: datetime

    @property
    def event_id(self) -> str:
        return self.headers.get("ce-id", "")


class Link(msgspec.Struct, frozen=True):
    """A place in the chain: an entry's sequence and its hash; 0 before the first."""

    seq: int = 0
    hash: bytes = GENESIS


def written(headers: Mapping[str, str]) -> dict[str, str]:
    """Those headers that are the event's own: the server's tell how it was sent, not what it is."""
    return {
        name: value for name, value in headers.items() if not name.startswith("Nats-") and name != ARRIVED
    }


def link(before: Link, entry: Entry) -> Link:
    """The next place in the chain."""
    said = [entry.seq, entry.subject, sorted(entry.headers.items()), entry.arrived, entry.data]
    return Link(entry.seq, sha256(before.hash + msgspec.json.encode(said)).digest())


def links(before: Link, entries: Iterable[Entry]) -> list[Link]:
    """The places of entries that follow each other."""
    found = []
    for entry in entries:
        before = link(before, entry)
        found.append(before)
    return found


def unlike(one: Entry, other: Entry) -> str | None:
    """In what two entries of one sequence differ; the time does not count, which a restored log has anew."""
    for name in ("subject", "headers", "data"):
        if getattr(one, name) != getattr(other, name):
            return name
    return None
