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
    """A picture's bytes are on disk and counted against the session that asked for it."""

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


@event("asset.ready")
class AssetReady(Event, frozen=True, kw_only=True):
    """A picture may be used: what other game services subscribe to."""

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


@event("asset.deleted")
class AssetDeleted(Event, frozen=True, kw_only=True):
    """An owner gave the asset up; its file goes when no reference is left."""

    asset_id: UUID
    asset_type: str
    job_id: UUID
    user_id: str
    content_hash: str
    format: str
    reason: str
    session_id: str | None = None
    character_id: str | None = None


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
