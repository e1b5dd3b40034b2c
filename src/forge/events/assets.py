"""What can happen to an asset.

An asset is a picture's content: equal pictures are one asset, referred to by every job that made it.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID

import msgspec

from forge.events.catalogue import Event, Moment, event


@event("asset.stored")
class AssetStored(Event, frozen=True, kw_only=True):
    """A picture's bytes are on disk and counted against the session that asked for it.

    ``session_bytes`` is what that session holds from then on, this picture included.
    """

    asset_id: UUID
    job_id: UUID
    user_id: str
    asset_type: str
    content_hash: str
    pixel_hash: str
    format: str
    file_path: str
    file_size_bytes: int
    width: int
    height: int
    dominant_color: str
    position: int
    generation_params: dict[str, Any]
    created_at: Moment
    expires_at: Moment | None = None
    session_id: str | None = None
    character_id: str | None = None
    category: str | None = None
    archetype_id: str | None = None
    variant_key: str | None = None
    session_bytes: int | None = None


@event("asset.ready")
class AssetReady(Event, frozen=True, kw_only=True):
    """A picture may be used: what other game services subscribe to.

    ``character_assets`` is what its character has from then on, this one included.
    """

    asset_id: UUID
    asset_type: str
    job_id: UUID
    user_id: str
    content_hash: str
    format: str
    width: int
    height: int
    file_size_bytes: int
    url: str
    session_id: str | None = None
    character_id: str | None = None
    category: str | None = None
    archetype_id: str | None = None
    variant_key: str | None = None
    character_assets: int | None = None


class AssetGivenUp(Event, frozen=True, kw_only=True):
    """One job's references to an asset are gone; the file goes when nobody's is left.

    ``pictures`` and ``file_size_bytes`` are what that gives back; ``character_assets`` is what the character
    has from then on.
    """

    asset_id: UUID
    asset_type: str
    job_id: UUID
    user_id: str
    content_hash: str
    format: str
    reason: str
    pictures: int = 1
    file_size_bytes: int = 0
    session_id: str | None = None
    character_id: str | None = None
    character_assets: int | None = None


@event("asset.deleted")
class AssetDeleted(AssetGivenUp, frozen=True, kw_only=True):
    """An owner, or a clean-up in the owner's place, gave the asset up."""


@event("asset.expired")
class AssetExpired(AssetGivenUp, frozen=True, kw_only=True):
    """The asset's time was over."""


class AssetPin(Event, frozen=True, kw_only=True):
    """Whether one job's reference to an asset stays whatever its time or the disk says."""

    asset_id: UUID
    asset_type: str
    job_id: UUID
    user_id: str
    session_id: str | None = None
    character_id: str | None = None


@event("asset.pinned")
class AssetPinned(AssetPin, frozen=True, kw_only=True):
    """Its owner wants to keep it: it neither expires nor makes room."""


@event("asset.unpinned")
class AssetUnpinned(AssetPin, frozen=True, kw_only=True):
    """It lives as long as it was given, and no longer."""


class AssetFault(Event, frozen=True, kw_only=True):
    """What was found where the file of a content should be; ``found`` says it in words.

    ``stored_seq`` is the storing that it belies.
    """

    asset_id: UUID
    asset_type: str
    content_hash: str
    format: str
    file_size_bytes: int
    found: str
    stored_seq: int


@event("asset.lost")
class AssetLost(AssetFault, frozen=True, kw_only=True):
    """There is a row, and no file."""


@event("asset.damaged")
class AssetDamaged(AssetFault, frozen=True, kw_only=True):
    """There is a file, and it is not the picture that was stored."""


@event("session.released")
class SessionReleased(Event, frozen=True, kw_only=True):
    """A session got bytes back, because one of its jobs' references is gone; ``session_bytes`` are left."""

    session_id: str
    asset_id: UUID
    job_id: UUID
    user_id: str
    released_bytes: int
    session_bytes: int


class Reads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often one user fetched one asset since it was last told, and when first and last."""

    asset_id: UUID
    user_id: str
    count: int
    first_at: Moment
    last_at: Moment


@event("asset.accessed")
class AssetsAccessed(Event, frozen=True, kw_only=True):
    """Pictures were fetched: what one API counted in a few seconds; ``source`` names the API."""

    source: str
    reads: list[Reads]
