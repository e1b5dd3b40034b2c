"""What may go, and when nothing may. No I/O, no clock.

A sweep takes what its reason says, never what is pinned, and without an operator not more than :func:`most`.
Whoever judges by time asks :func:`doubt` first: a wrong clock deletes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from uuid import UUID

import msgspec

from forge.events.assets import AssetDeleted, AssetExpired, AssetGivenUp

EXPIRED, OLD, EVICTED = "expired", "old", "evicted"
LOST, DAMAGED = "lost", "damaged"
ORPHANED, TEMPORARY = "orphaned", "temporary"

REASONS = (EXPIRED, OLD, EVICTED, LOST, DAMAGED, ORPHANED, TEMPORARY)
"""Its time is over; it is older than was asked for; the disk is full; its row has no file, or not the file
that was stored; a file has no row; a working file of a process that died."""

OF_FILES = frozenset({LOST, DAMAGED, ORPHANED, TEMPORARY})
"""Reasons that are about the volume, not about somebody's assets."""

BRAKE_FILES = 1000
BRAKE_RATIO = 0.2
BRAKE_FREE = 20
"""A sweep takes at most so many files, at most such a part of them all, but so few always."""

TOLERANCE = timedelta(minutes=5)
"""By how much two clocks may differ before neither is believed."""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One job's references to an asset; ``size_bytes`` is one picture's."""

    asset_id: UUID
    job_id: UUID
    asset_type: str
    user_id: str
    session_id: str | None
    character_id: str | None
    content_hash: str
    format: str
    pictures: int
    size_bytes: int


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """An asset, as far as its worth is concerned."""

    id: UUID
    size_bytes: int
    created_at: datetime
    last_accessed_at: datetime | None = None
    expires_at: datetime | None = None
    pinned: bool = False

    @property
    def used_at(self) -> datetime:
        return self.last_accessed_at or self.created_at


def given_up(claim: Claim, reason: str) -> AssetGivenUp:
    """The event by which a claim ends."""
    kind = AssetExpired if reason == EXPIRED else AssetDeleted
    return kind(
        asset_id=claim.asset_id,
        asset_type=claim.asset_type,
        job_id=claim.job_id,
        user_id=claim.user_id,
        content_hash=claim.content_hash,
        format=claim.format,
        reason=reason,
        pictures=claim.pictures,
        file_size_bytes=claim.pictures * claim.size_bytes,
        session_id=claim.session_id,
        character_id=claim.character_id,
    )


def most(of: int) -> int:
    """How many of so many files may go in one sweep without an operator."""
    return max(BRAKE_FREE, min(BRAKE_FILES, int(of * BRAKE_RATIO)))


def held(count: int, of: int) -> bool:
    """Whether a sweep waits for an operator."""
    return count > most(of)


def least_worth(assets: Iterable[Kept], bytes_: int, now: datetime) -> list[Kept]:
    """What goes so that so many bytes are free: expired first, then the least recently used, pinned never."""

    def worth(asset: Kept) -> tuple[bool, datetime, UUID]:
        over = asset.expires_at is not None and asset.expires_at <= now
        return not over, asset.used_at, asset.id

    chosen: list[Kept] = []
    for asset in sorted((a for a in assets if not a.pinned), key=worth):
        if bytes_ <= 0:
            break
        chosen.append(asset)
        bytes_ -= asset.size_bytes
    return chosen


def too_many_bytes(used: int, limit: int, target: float) -> int:
    """How many bytes are to go until the target is reached."""
    return max(0, used - int(limit * target))


def doubt(own: datetime, others: Sequence[datetime], newest: datetime | None) -> str:
    """Why ``own`` is not believed, empty where it is: the servers' clocks say otherwise, or the log has
    events from after it."""
    for other in others:
        if abs(own - other) > TOLERANCE:
            return f"this clock says {own:%F %T}, a server's {other:%F %T}"
    if newest is not None and newest > own + TOLERANCE:
        return f"this clock says {own:%F %T}, the newest event in the log is of {newest:%F %T}"
    return ""


def rest_of_grace(grace: timedelta, recorded: datetime, now: datetime) -> float:
    """Seconds until it ends, negative when it has; never more than the whole, whatever the clocks say."""
    return (grace - max(timedelta(0), now - recorded)).total_seconds()
