"""Whether a log is the one that is remembered, and whole.

A stream tells where it begins and ends and how many events are missing between; Postgres remembers events by
sequence and id. From these it follows that nothing is gone that was taken in, without reading the log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from forge.domain.closing import Mark


class Extent(msgspec.Struct, frozen=True):
    """What a stream says of itself: first and last sequence (``last`` is 0 in an empty one), and how many
    between them are missing; whether it is only being filled again; and where its book is closed."""

    first: int
    last: int
    missing: int = 0
    restoring: bool = False
    closed: Mark = Mark()


class Landmark(msgspec.Struct, frozen=True):
    """An event that ``whose`` remembers; with no id only that there was one."""

    whose: str
    seq: int
    id: str = ""


def lacking(extent: Extent) -> str | None:
    """What a stream by its own words lacks; None if nothing."""
    if extent.restoring:
        return f"it is being restored, as far as event {extent.last} by now: run forge log restore to its end"
    if extent.first > extent.closed.through + 1:
        return f"it begins at event {extent.first}, and the {extent.first - 1} before it are gone"
    if extent.missing:
        return f"{extent.missing} of its events between {extent.first} and {extent.last} are gone"
    return None


def unlike(extent: Extent, landmarks: Sequence[Landmark], ids: Mapping[int, str | None]) -> str | None:
    """What contradicts the memory of it; None if nothing.

    ``ids`` has the stream's own event ids, at the landmarks inside it among others; None for what it cannot
    show. Another log is told apart from one that lost its end, whichever of the two is longer.
    """
    inside = [mark for mark in landmarks if extent.first <= mark.seq <= extent.last]
    for mark in inside:
        found = ids.get(mark.seq)
        if found is not None and mark.id and found != mark.id:
            return f"it is another log: its event {mark.seq} is {found}, and {mark.whose} has {mark.id} there"
    beyond = max(landmarks, key=lambda mark: mark.seq, default=None)
    if beyond is not None and beyond.seq > extent.last:
        end = f"it ends at event {extent.last}" if extent.last else "it is empty"
        return f"{end}, and {beyond.whose} has event {beyond.seq}"
    unread = [seq for seq, found in ids.items() if found is None]
    return f"event {min(unread)} cannot be read" if unread else None


class _Numbered(Protocol):
    @property
    def seq(self) -> int: ...


def gap(last: int, events: Iterable[_Numbered]) -> str | None:
    """Where events do not follow ``last`` one by one; None if they do."""
    for event in events:
        if event.seq != last + 1:
            return f"event {event.seq} comes right after event {last}"
        last = event.seq
    return None
