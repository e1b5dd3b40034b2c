"""What a session and a character may hold, and how stored pictures count against it. No I/O, no clock.

Each entry of a ledger carries the balance after it, so that the newest one alone says what is in use. What
counts are references: a picture that two jobs made counts for both, though it lies on disk once.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from forge.domain.limits import MAX_CHARACTER_ASSETS, MAX_SESSION_BYTES
from forge.errors import Limit, LimitReached
from forge.events.assets import AssetGivenUp, AssetReady, AssetStored, SessionReleased
from forge.events.catalogue import Event
from forge.events.jobs import JobSubmitted, Original, Produced, Regenerated

_change = msgspec.structs.replace


def count_in(
    pictures: Sequence[AssetStored], session_bytes: int, character_assets: int
) -> list[AssetStored | AssetReady]:
    """The events that make a job's pictures part of the library, with the balances that follow.

    All pictures are of one session and one character; where there is none, nothing is counted.

    Raises:
        LimitReached: the session (L3) or the character (L4) would hold more than it may.
    """
    events: list[AssetStored | AssetReady] = []
    for picture in pictures:
        stored = picture
        if picture.session_id is not None:
            session_bytes += picture.file_size_bytes
            stored = _change(picture, session_bytes=session_bytes)
        character_assets += picture.character_id is not None
        events += [stored, _ready(stored, character_assets if picture.character_id is not None else None)]
    _demand("session_bytes", MAX_SESSION_BYTES, session_bytes)
    _demand("character_assets", MAX_CHARACTER_ASSETS, character_assets)
    return events


def give_back(gone: AssetGivenUp, session_bytes: int, character_assets: int) -> list[Event]:
    """The events that take a job's references to an asset out of the library, with the new balances."""
    events: list[Event] = [gone]
    if gone.character_id is not None:
        events = [_change(gone, character_assets=max(0, character_assets - gone.pictures))]
    if gone.session_id is not None:
        released = SessionReleased(
            session_id=gone.session_id,
            asset_id=gone.asset_id,
            job_id=gone.job_id,
            user_id=gone.user_id,
            released_bytes=gone.file_size_bytes,
            session_bytes=max(0, session_bytes - gone.file_size_bytes),
        )
        events.append(released)
    return events


def lent(picture: AssetStored, asked: JobSubmitted, now: datetime, ttl: timedelta) -> AssetStored:
    """A picture that another job made, as what this one gets."""
    return _change(
        picture,
        job_id=asked.job_id,
        user_id=asked.user_id,
        session_id=asked.session_id,
        character_id=asked.character_id,
        generation_params=asked.params,
        created_at=now,
        expires_at=now + ttl,
        session_bytes=None,
    )


def produced(stored: AssetStored) -> Produced:
    """A picture as a job's completion tells of it."""
    return Produced(
        asset_id=stored.asset_id,
        asset_type=stored.asset_type,
        content_hash=stored.content_hash,
        format=stored.format,
        size_bytes=stored.file_size_bytes,
    )


def original(stored: AssetStored) -> Original:
    """A picture as the request to draw it again names it."""
    return Original(
        asset_id=stored.asset_id,
        content_hash=stored.content_hash,
        pixel_hash=stored.pixel_hash,
        position=stored.position,
    )


def regenerated(wanted: Original | None, pictures: Sequence[AssetStored]) -> Regenerated | None:
    """What came of drawing a picture again; None where nothing was to be. It is compared with the picture
    that stands where it stood."""
    if wanted is None:
        return None
    made = next((p for p in pictures if p.position == wanted.position), None)
    if made is not None and made.content_hash == wanted.content_hash:
        return "identical"
    return "identical_pixels" if made is not None and made.pixel_hash == wanted.pixel_hash else "other_pixels"


def answers(wanted: Original | None, pictures: Sequence[AssetStored]) -> bool:
    """Whether pictures of the shelf may stand for what was asked: of a picture that is to be drawn again,
    only the very same. Another one of its recipe may be there, and this one still come out of ComfyUI."""
    return wanted is None or regenerated(wanted, pictures) == "identical"


def _demand(name: str, allowed: int, used: int) -> None:
    if used > allowed:
        raise LimitReached(Limit(name, allowed, used), f"{name}: {used} would be in use, {allowed} may be")


def _ready(stored: AssetStored, character_assets: int | None) -> AssetReady:
    return AssetReady(
        asset_id=stored.asset_id,
        asset_type=stored.asset_type,
        job_id=stored.job_id,
        user_id=stored.user_id,
        content_hash=stored.content_hash,
        format=stored.format,
        width=stored.width,
        height=stored.height,
        file_size_bytes=stored.file_size_bytes,
        url=f"/api/v1/comfyui/assets/{stored.asset_id}/file",
        session_id=stored.session_id,
        character_id=stored.character_id,
        category=stored.category,
        archetype_id=stored.archetype_id,
        variant_key=stored.variant_key,
        character_assets=character_assets,
    )
